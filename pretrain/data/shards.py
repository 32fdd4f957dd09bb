"""What are the bytes of sample i of a data set?"""

from __future__ import annotations

import contextlib
import os
from array import array
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from data_prep.schema import (
    MANIFEST_NAME,
    TAR_BLOCK,
    Manifest,
    index_bytes,
    index_path,
    read_index,
    sha256_file,
)
from pretrain.data.faults import BadSample

OPEN_SHARDS = 64  # files and indices kept open at once, unless told otherwise
REGULAR_FILE = (b"0", b"\0")  # tar type flags


class ShardFolder:
    """A data set folder with random access: one positioned read a sample.

    At construction every shard's size is checked against the manifest, by `verify` its sha256 too; both raise
    FileNotFoundError and ValueError that name the shard. Afterwards a sample that cannot be read raises
    BadSample: `missing_shard`, `unreadable`, `truncated_shard`, `broken_index` or `broken_record`.
    """

    def __init__(self, folder: str | os.PathLike[str], open_shards: int = OPEN_SHARDS) -> None:
        self.folder, self._most_open = Path(folder), open_shards
        self.manifest = Manifest.read(self.folder)
        self.shard_sizes = [shard.num_samples for shard in self.manifest.shards]
        self._ends = list(accumulate(self.shard_sizes))
        self._open: dict[int, tuple[int, array, str]] = {}  # shard -> descriptor, offsets, path; oldest first

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # a worker process opens its own files

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.manifest.shards)

    @property
    def sha256(self) -> str:
        """Of the manifest, which holds that of every shard: it names the whole content."""
        return sha256_file(self.folder / MANIFEST_NAME)

    def verify(self, num_shards: int) -> None:
        """Compare the sha256 of the first `num_shards` shards with the manifest; ValueError names the first
        one that differs."""
        for shard in self.manifest.shards[:num_shards]:
            found = sha256_file(self.folder / shard.name)
            if found != shard.sha256:
                raise ValueError(
                    f"{self.folder / shard.name} has sha256 {found}, the manifest says {shard.sha256}: "
                    "the shard changed after it was built; copy it again or build the data set again"
                )

    def locate(self, index: int) -> tuple[int, int]:
        """Shard number and index inside the shard of sample `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.folder} must lie in [0, {len(self)})")
        shard = bisect_right(self._ends, index)
        return shard, index - self._ends[shard] + self.shard_sizes[shard]

    def sample(self, index: int) -> dict[str, bytes]:
        """Extension ("jpg", "txt", "mask.png", ...) -> content of sample `index`."""
        return self.read(*self.locate(index))[1]

    def key(self, index: int) -> str:
        """The name that the members of sample `index` share."""
        return self.read(*self.locate(index))[0]

    def read(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """Key and members (extension -> content) of one sample of one shard."""
        descriptor, offsets, path = self._open.get(shard) or self._open_another(shard)
        start, size = offsets[index], offsets[index + 1] - offsets[index]
        try:
            record = os.pread(descriptor, size, start)
        except OSError as error:
            raise BadSample(
                "unreadable", f"{path}: reading {size} bytes at {start} failed: {error}"
            ) from error
        if len(record) != size:
            raise BadSample(
                "truncated_shard", f"{path} ended {size - len(record)} bytes before the end of sample {index}"
            )
        try:
            return read_members(record)
        except BadSample as error:
            raise BadSample(error.reason, f"{path}, sample {index}: {error}") from error

    def close(self) -> None:
        for descriptor, *_ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _open_another(self, shard: int) -> tuple[int, array, str]:
        if len(self._open) >= self._most_open:
            os.close(self._open.pop(next(iter(self._open)))[0])
        path = self.folder / self.manifest.shards[shard].name
        self._open[shard] = (*_open_shard(path, self.shard_sizes[shard]), str(path))
        return self._open[shard]


def _open_shard(path: Path, num_samples: int) -> tuple[int, array]:
    """File descriptor and sample offsets of one shard, which is indexed if it is not yet; raises BadSample."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise BadSample("missing_shard", str(error)) from error
    except OSError as error:
        raise BadSample("unreadable", f"{path}: {error}") from error
    try:
        offsets = read_index(path) if index_path(path).is_file() else _index(descriptor, path)
        if len(offsets) != num_samples + 1:
            raise BadSample(
                "broken_index",
                f"{path}.idx holds {len(offsets)} offsets, the manifest's {num_samples} samples need one more",
            )
    except OSError as error:
        os.close(descriptor)
        raise BadSample("unreadable", f"{path}: {error}") from error
    except ValueError as error:  # a BadSample is one
        os.close(descriptor)
        raise error if isinstance(error, BadSample) else BadSample("broken_index", str(error)) from error
    return descriptor, offsets


def _index(descriptor: int, path: Path) -> array:
    """Offsets of the samples of a shard that came without an index, from its headers: one short read a member.

    Kept beside the shard for the next time, where this process may write. Raises BadSample for what is no shard of
    data_prep.
    """
    offsets, last_key, at = array("Q"), None, 0
    while (header := os.pread(descriptor, TAR_BLOCK, at)).strip(b"\0"):  # a block of zeros ends an archive
        try:
            name, size = _read_header(header)
        except BadSample as error:
            raise BadSample(
                "broken_index", f"{path} has no index and cannot get one: byte {at}: {error}"
            ) from error
        key = name.partition(".")[0]
        if key != last_key:
            offsets.append(at)
            last_key = key
        at += TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK
    offsets.append(at)
    partial = path.with_name(f".{path.name}.idx.{os.getpid()}")  # workers may index the same shard at once
    try:
        partial.write_bytes(index_bytes(offsets.tolist()))
        partial.replace(index_path(path))
    except OSError:  # a data set that others own
        with contextlib.suppress(OSError):
            partial.unlink()
    return offsets


def read_members(record: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and members of the USTAR records of one sample, as data_prep writes them.

    A strict reader of that one format: tarfile takes 20 times as long for a sample. Raises BadSample
    `broken_record`.
    """
    key, members, at = "", {}, 0
    while at < len(record):
        name, size = _read_header(record[at : at + TAR_BLOCK])
        at += TAR_BLOCK
        member_key, _, extension = name.partition(".")
        if members and member_key != key:
            raise BadSample("broken_record", f"member {name!r} follows members of {key!r}")
        key = member_key
        members[extension] = record[at : at + size]
        at += -(-size // TAR_BLOCK) * TAR_BLOCK
        if at > len(record):
            raise BadSample("broken_record", f"member {name!r} of {size} bytes exceeds its sample")
    return key, members


def _read_header(header: bytes) -> tuple[str, int]:
    """Name and content size of one USTAR member (POSIX.1-1988); raises BadSample."""
    try:
        checksum, size = int(header[148:156].strip(b"\0 "), 8), int(header[124:136].strip(b"\0 "), 8)
        name = header[:100].rstrip(b"\0").decode("ascii")
    except ValueError as error:
        raise BadSample("broken_record", f"no tar header where one must stand: {error}") from error
    counted = header[:148] + header[156:]  # the checksum itself counts as eight spaces
    is_intact = sum(counted.translate(None, b"\0")) + 8 * ord(" ") == checksum  # most bytes are 0
    if not is_intact or header[257:262] != b"ustar" or header[156:157] not in REGULAR_FILE:
        raise BadSample("broken_record", f"the header of {name!r} is broken or not of a plain USTAR file")
    return name, size
