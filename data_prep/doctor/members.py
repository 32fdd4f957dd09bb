"""Which samples does a shard hold? Read as this package writes them: anything else in the tar is a fault."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, runtime_checkable

from data_prep.doctor.finished import BadDataSet, index_at
from data_prep.places import Place
from data_prep.schema import KEY_PATTERN, TAR_BLOCK

_EMPTY = tarfile.TarInfo().tobuf(
    tarfile.USTAR_FORMAT, "ascii", "strict"
)  # header without a name and of no bytes
_FIXED = _EMPTY[100:124], _EMPTY[135:148], _EMPTY[156:]  # what all headers of the builder share
_CHECKSUM = sum(_EMPTY[:124]) + sum(_EMPTY[135:148]) + 8 * ord(" ") + sum(_EMPTY[156:])  # of that share
_SIZE = re.compile(rb"[0-7]{11}")
_MEMBER = re.compile(rf"({KEY_PATTERN.pattern})\.([a-z.]+)")


@runtime_checkable
class Readable(Protocol):
    """What is read from start to end."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes, fewer than `size` only at the end."""

    def tell(self) -> int:
        """Bytes read so far."""


class Hashed:
    """A file that is read from start to end, and its SHA-256 so far."""

    def __init__(self, file: Readable) -> None:
        self._file, self.hash, self.num_bytes = file, hashlib.sha256(), 0

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        content = self._file.read(size)
        self.hash.update(content)
        self.num_bytes += len(content)
        return content

    def tell(self) -> int:
        """Bytes read so far."""
        return self.num_bytes


@dataclass(frozen=True)
class Member:
    """One file of a sample."""

    name: str
    key: str
    extension: str
    content: bytes
    start: int  # bytes; of its header in the tar
    end: int  # of its padding


def samples_of(file: Readable) -> Iterator[tuple[str, list[Member]]]:
    """Keys and members of the samples of a tar, in order; BadDataSet where it is not as the builder writes it."""
    for key, group in groupby(members_of(file), key=lambda member: member.key):
        yield key, list(group)


def members_of(file: Readable, has_end: bool = True) -> Iterator[Member]:
    """The members of a tar as this package writes it: plain USTAR headers, zero padding, zeros at the end.

    Without `has_end` it is a piece of a tar, and its last byte is the end.
    """
    last = "the start"
    while True:
        start = file.tell()
        block = file.read(TAR_BLOCK)
        if not block and not has_end:
            return
        if len(block) < TAR_BLOCK:
            raise BadDataSet(f"it is cut off at byte {start + len(block)}, after member {last}")
        if not any(block):
            while rest := file.read(2**20):
                if any(rest):
                    raise BadDataSet(f"there are bytes behind its end, after member {last}")
            return
        shown = block[:100].split(b"\0")[0].decode("ascii", "replace")
        name, size = _header(block) or ("", 0)
        match = _MEMBER.fullmatch(name)
        if match is None:
            raise BadDataSet(f"member {shown} (byte {start}, after {last}): its tar header is broken")
        padded = -(-size // TAR_BLOCK) * TAR_BLOCK
        data = file.read(padded)
        if len(data) < padded:
            raise BadDataSet(f"member {name}: it is cut off at byte {start + TAR_BLOCK + len(data)}")
        if data[size:].strip(b"\0"):
            raise BadDataSet(f"member {name}: its padding is not zero")
        last = name
        yield Member(name, match[1], match[2], data[:size], start, file.tell())


def _header(block: bytes) -> tuple[str, int] | None:
    """Name and size of the member in a block, None unless the header is spelt as the builder spells it."""
    fixed = block[100:124], block[135:148], block[156:]
    if fixed == _FIXED and (match := _SIZE.fullmatch(block[124:135])):
        name = block[:100].rstrip(b"\0")
        checksum = _CHECKSUM + sum(name) + sum(match[0])
        if block[148:156] == b"%06o\0 " % checksum and b"\0" not in name and name.isascii():
            return name.decode("ascii"), int(match[0], 8)
    try:  # a name beyond 100 letters is spelt in two parts
        header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        is_ours = header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") == block
        return (header.name, header.size) if is_ours else None
    except (tarfile.HeaderError, ValueError):
        return None


def read_sample(place: Place, shard: str, number: int) -> list[Member]:
    """The members of sample `number` of a shard by one positioned read; BadDataSet when they do not stand there."""
    offsets = index_at(place, shard)
    if not 0 <= number < len(offsets) - 1:
        raise BadDataSet(f"it has {len(offsets) - 1} samples, none of the number {number}")
    with place.open(shard) as file:
        file.seek(offsets[number])
        piece = file.read(offsets[number + 1] - offsets[number])
    if len(piece) < offsets[number + 1] - offsets[number]:
        raise BadDataSet(f"sample {number}: the shard is cut off inside it")
    members = list(members_of(io.BytesIO(piece), has_end=False))
    if len({member.key for member in members}) != 1:
        raise BadDataSet(f"sample {number}: its index does not lead to one sample")
    return members


def read_keys(place: Place, shard: str, numbers: Sequence[int]) -> list[str]:
    """The keys of some samples of a shard, a header read for each; BadDataSet when they do not stand there."""
    offsets = index_at(place, shard)
    keys = []
    with place.open(shard) as file:
        for number in numbers:
            if not 0 <= number < len(offsets) - 1:
                raise BadDataSet(f"{shard} has {len(offsets) - 1} samples, none of the number {number}")
            file.seek(offsets[number])
            match = _MEMBER.fullmatch((_header(file.read(TAR_BLOCK)) or ("", 0))[0])
            if match is None:
                raise BadDataSet(f"{shard} sample {number}: its index does not lead to it")
            keys.append(match[1])
    return keys
