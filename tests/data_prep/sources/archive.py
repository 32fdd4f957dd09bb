"""Tars as ImageNet publishes them, and tars as nobody should."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence


def tar_of(files: Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A plain tar of these files; a name may come twice."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header(name: bytes, size: int | bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """One block with a right checksum, whatever it claims; a size may be the raw field."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size if size < 8**11 else _base256(size)
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148], block[148:156] = field, b"00000000000\0", b" " * 8
    block[156:157], block[157 : 157 + len(link)], block[257:265] = kind, link, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _base256(size: int) -> bytes:
    return bytes([0x80]) + size.to_bytes(11, "big")
