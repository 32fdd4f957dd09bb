"""What are the bytes of sample i of a data set?"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from data_prep.index import index_bytes, index_path, read_index
from data_prep.schema import (
    MANIFEST_NAME,
    TAR_BLOCK,
    Manifest,
    Shard,
    parse_manifest,
    require_shard,
    sha256_file,
)
from pretrain.data.cache import Cache
from pretrain.data.faults import BadSample, DataError
from pretrain.data.remote import Place, RemoteFolder, is_url
from pretrain.data.verified import Verified

OPEN_SHARDS = 64  # files and indices kept open at once, unless told otherwise
ALL, NONE = slice(None), slice(0)  # shards
REGULAR_FILE = (b"0", b"\0")  # tar type flags


class ShardFolder:
    """A data set with random access, in a folder or behind a URL: one positioned read a sample.

    At construction the sizes of the shards that `checked` selects are compared with the manifest, by `verify` their
    sha256 too; both raise FileNotFoundError and ValueError that name the shard. Shards behind a URL are copied when
    they are first read, and hashed then. Afterwards a sample that cannot be read raises BadSample: `missing_shard`,
    `unreadable`, `truncated_shard`, `changed_shard`, `broken_index` or `broken_record`.
    """

    def __init__(
        self, place: str | os.PathLike[str], open_shards: int = OPEN_SHARDS, checked: slice = ALL
    ) -> None:
        self.place: Place = place if isinstance(place, str) and is_url(place) else Path(place)
        self._most_open = open_shards
        self._remote = (
            None if isinstance(self.place, Path) else RemoteFolder(self.place, Cache.of_environment())
        )
        if self._remote is not None:
            self._remote.copy_manifest()
        self.folder = Path(place) if self._remote is None else self._remote.folder
        self.manifest = parse_manifest(self.folder)
        for problem in self.problems(checked):
            raise problem
        self.shard_sizes = [shard.num_samples for shard in self.manifest.shards]
        self._ends = list(accumulate(self.shard_sizes))
        self._bad: dict[int, tuple[str, str]] = {}  # shard that cannot be opened -> reason and message
        self._open: dict[int, tuple[int, array, str]] = {}  # shard -> descriptor, offsets, path; oldest first

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}, "_bad": {}}  # a worker process opens its own files

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.manifest.shards)

    def is_here(self, shard: int) -> bool:
        """Can the shard of this number be read without a store? It lies on a disk, or in the cache."""
        return self._remote is None or self._remote.cache.path_of(self.manifest.shards[shard]).exists()

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    @property
    def sha256(self) -> str:
        """Of the manifest, which holds that of every shard: it names the whole content."""
        return sha256_file(self.folder / MANIFEST_NAME)

    def problems(self, checked: slice = ALL) -> Iterator[FileNotFoundError | ValueError]:
        """What is wrong with the presence and size of these shards."""
        shards = self.manifest.shards[checked]
        if self._remote is None:
            for shard in shards:
                try:
                    require_shard(self.folder, shard)
                except (FileNotFoundError, ValueError) as error:
                    yield error
        elif (
            shards[:1] == self.manifest.shards[:1]
        ):  # one listing tells all: of many ranks the first asks for it
            sizes = self._remote.sizes()
            for shard in self.manifest.shards:
                if sizes.get(shard.name, 0) not in (shard.num_bytes, None):
                    yield ValueError(
                        f"{self.place}/{shard.name} has {sizes.get(shard.name, 'no')} bytes, the manifest says "
                        f"{shard.num_bytes}: copy it again or build the data set again"
                    )

    def changed(self, shards: Iterable[int]) -> Iterator[tuple[Shard, ValueError]]:
        """What the sha256 of these shards of a folder says against the manifest, where that was not found right since
        they last changed. Shards that are missing or too short are told by `problems`."""
        verified = Verified(self.folder)
        for number in shards:
            shard = self.manifest.shards[number]
            try:
                require_shard(self.folder, shard)
            except (FileNotFoundError, ValueError):
                continue
            try:
                verified.check(shard)
            except ValueError as error:
                yield shard, error

    def verify(self, shards: Iterable[int]) -> None:
        """ValueError with the first that `changed` tells."""
        for _, problem in self.changed(shards):
            raise problem

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Copies shards behind a URL before they are read; in a folder there is nothing to do."""
        if self._remote is not None:
            self._remote.fetch_ahead([self.manifest.shards[shard] for shard in shards])

    def keep_ahead(self) -> None:
        """Says that what was last asked to be copied is still needed: other sources may have moved on since."""
        if self._remote is not None:
            self._remote.keep_ahead()

    def locate(self, index: int) -> tuple[int, int]:
        """Shard number and index inside the shard of sample `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.place} must lie in [0, {len(self)})")
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
        for shard in list(self._open):
            self._close(shard)
        if self._remote is not None:
            self._remote.close()

    def _close(self, shard: int) -> None:
        os.close(self._open.pop(shard)[0])

    def _open_another(self, number: int) -> tuple[int, array, str]:
        if number in self._bad:
            raise BadSample(*self._bad[number])
        if len(self._open) >= self._most_open:
            self._close(next(iter(self._open)))
        shard = self.manifest.shards[number]
        try:
            if self._remote is None:
                descriptor, path = _open_file(self.folder / shard.name)
            else:
                for other, (opened, *_) in list(self._open.items()):
                    if (
                        os.fstat(opened).st_nlink == 0
                    ):  # removed from the cache: the disk has it back only now
                        self._close(other)
                descriptor, path = self._remote.open(shard)
            self._open[number] = (descriptor, _offsets(descriptor, path, shard), str(path))
        except BadSample as error:  # it would take as long to find that again for each of its samples
            self._bad[number] = (error.reason, str(error))
            raise
        return self._open[number]


def read_manifest(place: Place) -> Manifest:
    """The manifest of a data set in a folder or behind a URL, whose shards are not looked at; errors as
    `ShardFolder`."""
    return ShardFolder(place, checked=NONE).manifest


def _open_file(path: Path) -> tuple[int, Path]:
    """Descriptor and path of a shard; raises BadSample, and DataError where the process may not open another file."""
    try:
        return os.open(path, os.O_RDONLY), path
    except FileNotFoundError as error:
        raise BadSample("missing_shard", str(error)) from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # of the machine: the shard may be good
            raise DataError(f"{error}: raise the limit (`ulimit -n`) or lower mixing.window") from error
        raise BadSample("unreadable", f"{path}: {error}") from error


def _offsets(descriptor: int, path: Path, shard: Shard) -> array:
    """Where the samples of an open shard lie; it is indexed if it is not yet. Closes it and raises BadSample."""
    try:
        try:
            offsets, has_index = read_index(path), True
        except FileNotFoundError:
            offsets, has_index = _index(descriptor, path), False
        if len(offsets) != shard.num_samples + 1:
            raise BadSample(
                "broken_index",
                f"{path}.idx holds {len(offsets)} offsets, the manifest's {shard.num_samples} samples need one more",
            )
        if not has_index:
            _keep_index(path, offsets)
    except OSError as error:
        os.close(descriptor)
        raise BadSample("unreadable", f"{path}: {error}") from error
    except ValueError as error:  # a BadSample is one
        os.close(descriptor)
        raise error if isinstance(error, BadSample) else BadSample("broken_index", str(error)) from error
    return offsets


def _index(descriptor: int, path: Path) -> array:
    """Offsets of the samples of a shard that came without an index, from its headers: one short read a member.

    Raises BadSample for what is no whole shard of data_prep.
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
    if not header:
        raise BadSample(
            "truncated_shard", f"{path} has no index and cannot get one: it ends before its end mark"
        )
    offsets.append(at)
    return offsets


def _keep_index(path: Path, offsets: array) -> None:
    """Writes the index of a shard for the next time, where this process may."""
    partial = path.with_name(
        f".{path.name}.idx.{socket.gethostname()}.{os.getpid()}"
    )  # workers may index the same shard at once
    try:
        partial.write_bytes(index_bytes(offsets.tolist()))
        partial.replace(index_path(path))
    except OSError:  # a data set that others own
        with contextlib.suppress(OSError):
            partial.unlink()


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
