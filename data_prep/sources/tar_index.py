"""Which regular files does a tar hold, and where? From its headers alone, whatever they claim.

Nothing is extracted, opened by a name from the archive, or read but headers: so links, devices, names such as ../../x
and sizes of 2^60 bytes do no harm. Extended headers (pax, GNU) are read up to a limit. Sparse files are passed over,
since their bytes do not lie in one piece.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512  # bytes
PADDING = (
    2**16
)  # bytes that are looked at behind the end mark, which must be zeros; writers pad to 10,240 or so
MAX_SIZE = 2**63 - 1  # bytes of a file
MAX_HEADER = 2**20  # bytes of an extended header; none that is honest comes near
REGULAR = (b"0", b"\0", b"7")
LONG_NAME, LONG_LINK, PAX, PAX_FOR_ALL = b"L", b"K", b"x", b"g"
ARCHIVE_STARTS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
}
_OCTAL = re.compile(rb"[0-7]+")


@dataclass(frozen=True)
class Member:
    """A regular file in a tar; `num_bytes` is what its header claims, fewer may be there."""

    name: str
    offset: int  # bytes from the start of the file that holds the tar
    num_bytes: int


class BadTar(ValueError):
    """Bytes that are no tar, or no more of one, or not all of one."""


def members_of(file: io.BufferedIOBase, start: int = 0, num_bytes: int | None = None) -> Iterator[Member]:
    """The regular files of the tar in `file` at [start, start + num_bytes), or up to the end of the file.

    A last member that is cut off is listed. Raises BadTar at the first header that is none, and where the zeros that
    close a tar are missing or stand in its middle; always after all members before that place.
    """
    file_end = file.seek(0, io.SEEK_END)
    end = file_end if num_bytes is None else min(start + num_bytes, file_end)
    place, long_name, pax = start, None, {}
    is_first = True
    while place + BLOCK <= end:
        file.seek(place)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            break
        if not header.strip(b"\0"):  # the end of the archive; what follows is padding
            if file.read(min(PADDING, end - place - BLOCK)).strip(b"\0"):
                raise BadTar("something follows the zeros that close it, or they stand where a header was")
            return
        kind, size = _parsed(header, is_first)
        is_first = False
        body, place = place + BLOCK, place + BLOCK + -(-size // BLOCK) * BLOCK
        if kind in (LONG_NAME, PAX):
            content = _extended(file, body, size, end)
            if kind == PAX:
                pax = _pax(content)
            else:
                long_name = content.rstrip(b"\0")
            continue
        if kind in (LONG_LINK, PAX_FOR_ALL):
            continue
        is_sparse = any(name.startswith("GNU.sparse") for name in pax)
        if "size" in pax:
            size = _decimal(pax["size"])
            place = body + -(-size // BLOCK) * BLOCK
        name = pax["path"].encode("utf-8", "surrogateescape") if "path" in pax else long_name or _name(header)
        if kind in REGULAR and not is_sparse and not name.endswith(b"/"):
            yield Member(name.decode("utf-8", "surrogateescape"), body, size)
        long_name, pax = None, {}
    if is_first:
        file.seek(start)
        raise BadTar(_no_tar(file.read(BLOCK), "it is shorter than one header of a tar"))
    raise BadTar("it is cut off: the zeros that close a tar are missing")


def _parsed(header: bytes, is_first: bool) -> tuple[bytes, int]:
    """Kind and size that a header tells, its checksum verified."""
    told = header[148:156].strip(b" \0")
    computed = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if not (_OCTAL.fullmatch(told) and int(told, 8) == computed):
        raise BadTar(_no_tar(header, "it is no plain tar file") if is_first else "a header is damaged")
    kind = header[156:157]
    has_body = kind not in (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
    return kind, _size(header[124:136]) if has_body else 0


def _no_tar(start: bytes, otherwise: str) -> str:
    packed = next((name for mark, name in ARCHIVE_STARTS.items() if start.startswith(mark)), None)
    return f"it is packed by {packed}, unpack it first" if packed else otherwise


def _size(field: bytes) -> int:
    if field[0] & 0x80:  # base 256
        size = int.from_bytes(field, "big") & ~(0x80 << 88)
        if field[0] == 0xFF or size > MAX_SIZE:
            raise BadTar("a header tells a negative or endless size")
        return size
    digits = field.strip(b" \0") or b"0"
    if not _OCTAL.fullmatch(digits):  # int() would also take a sign, and go backwards
        raise BadTar("a header tells a size that is no number")
    return int(digits, 8)


def _name(header: bytes) -> bytes:
    name = header[:100].rstrip(b"\0").split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _extended(file: io.BufferedIOBase, body: int, size: int, end: int) -> bytes:
    if size > MAX_HEADER or body + size > end:
        raise BadTar(f"an extended header claims {size} bytes")
    file.seek(body)
    return file.read(size)


def _pax(content: bytes) -> dict[str, str]:
    """The records "<length> <name>=<value>\\n" of a pax header."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        length, _, _ = content.partition(b" ")
        try:
            num_bytes = int(length)
        except ValueError as error:
            raise BadTar("a pax header is damaged") from error
        if not len(length) + 2 < num_bytes <= len(content):
            raise BadTar("a pax header is damaged")
        name, _, value = content[len(length) + 1 : num_bytes - 1].partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[num_bytes:]
    return records


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_SIZE):
        raise BadTar(f"a pax header tells the size {text[:40]!r}")
    return int(text)
