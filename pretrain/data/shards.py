"""What are the bytes of sample i of a data set?"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

from data_prep.files import sha256_file
from data_prep.schema import MANIFEST_NAME, Manifest, Shard, parse_manifest, require_shard
from pretrain.data.cache import Cache
from pretrain.data.damage import can_be_read_elsewhere
from pretrain.data.faults import BadSample, DataAway, DataError
from pretrain.data.open_shards import OpenShards, of_file
from pretrain.data.records import read_members
from pretrain.data.remote import RemoteFolder
from pretrain.data.store import PATIENCE_AT_START
from pretrain.data.verified import Verified
from pretrain.place import Place, is_url

OPEN_SHARDS = 64  # files and indices kept open at once, unless told otherwise
OTHERS = 8  # shards that tell whether one that cannot be read is damaged alone
ALL, NONE = slice(None), slice(0)  # shards


class ShardFolder:
    """A data set with random access, in a folder or behind a URL: one positioned read a sample.

    At construction the sizes of the shards that `checked` selects are compared with the manifest, by `verify` their
    sha256 too; both raise FileNotFoundError and ValueError that name the shard. Shards behind a URL are copied when
    they are first read, and hashed then. Afterwards a sample that cannot be used raises BadSample, of its shard
    `missing_shard`, `truncated_shard`, `changed_shard` or `broken_index`, of itself `broken_record` or `unreadable`;
    a file system that fails raises DataAway in the end, see `OpenShards`.
    """

    def __init__(
        self, place: str | os.PathLike[str], open_shards: int = OPEN_SHARDS, checked: slice = ALL
    ) -> None:
        self.place: Place = place if isinstance(place, str) and is_url(place) else Path(place)
        self._remote = (
            None if isinstance(self.place, Path) else RemoteFolder(self.place, Cache.of_environment())
        )
        if self._remote is not None:
            self._remote.copy_manifest()
        self.folder = Path(place) if self._remote is None else self._remote.folder
        self.manifest = of_file(
            lambda: parse_manifest(self.folder), self.folder / MANIFEST_NAME, PATIENCE_AT_START
        )
        for problem in self.problems(checked):
            raise problem
        self.shard_sizes = [shard.num_samples for shard in self.manifest.shards]
        self._ends = list(accumulate(self.shard_sizes))
        self._files = OpenShards(self.folder, self.manifest.shards, self._remote, open_shards)

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.manifest.shards)

    def is_here(self, shard: int) -> bool:
        """Can the shard of this number be read without a store? It lies on a disk, or in the cache."""
        return self._remote is None or self._remote.holds(self.manifest.shards[shard])

    def is_whole(self, name: str) -> bool:
        """Does this shard lie in the folder, as large as it must be? False of a store, which is not asked."""
        shard = next((one for one in self.manifest.shards if one.name == name), None)
        if shard is None or self._remote is not None:
            return False
        try:
            self._require(shard)
        except (FileNotFoundError, ValueError):
            return False
        return True

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    @property
    def sha256(self) -> str:
        """Of the manifest, which holds that of every shard: it names the whole content."""
        path = self.folder / MANIFEST_NAME
        return of_file(lambda: sha256_file(path), path, PATIENCE_AT_START)

    def problems(self, checked: slice = ALL) -> Iterator[FileNotFoundError | ValueError]:
        """What is wrong with the presence and size of these shards; raises DataAway where none can be read."""
        shards = self.manifest.shards[checked]
        if self._remote is None:
            for shard in shards:
                try:
                    self._require(shard)
                except (FileNotFoundError, ValueError) as error:
                    yield self._of_shard(error, shard) if isinstance(error, DataAway) else error
        elif (
            shards[:1] == self.manifest.shards[:1]
        ):  # one listing tells all: of many ranks the first asks for it
            sizes = self._remote.store.sizes()
            for shard in self.manifest.shards:
                if sizes.get(shard.name, 0) not in (shard.num_bytes, None):
                    yield ValueError(
                        f"{self.place}/{shard.name} has {sizes.get(shard.name, 'no')} bytes, the manifest says "
                        f"{shard.num_bytes}: copy it again or build the data set again"
                    )

    def changed(self, shards: Iterable[int]) -> Iterator[tuple[Shard, ValueError]]:
        """What the sha256 of these shards of a folder says against the manifest, where that was not found right since
        they last changed. Shards that are missing or too short are told by `problems`, those that cannot be read to
        their end when that sample is asked for."""
        return (found for found in self._hashed(shards) if not isinstance(found[1], DataError))

    def verify(self, shards: Iterable[int]) -> None:
        """ValueError with the first that `changed` tells, or that cannot be read."""
        for _, problem in self._hashed(shards):
            raise problem

    def _hashed(self, shards: Iterable[int]) -> Iterator[tuple[Shard, ValueError]]:
        manifest = self.folder / MANIFEST_NAME
        verified = of_file(lambda: Verified(self.folder), manifest, PATIENCE_AT_START)
        for number in shards:
            shard = self.manifest.shards[number]
            try:
                self._require(shard)
            except (FileNotFoundError, ValueError):
                continue
            try:
                of_file(partial(verified.check, shard), self.folder / shard.name, PATIENCE_AT_START)
            except ValueError as error:
                yield shard, self._of_shard(error, shard) if isinstance(error, DataAway) else error

    def first_bytes(self, number: int, num_bytes: int) -> bytes:
        """Of a shard of a folder; DataError where it is damaged, alone, DataAway where its file system fails."""
        shard = self.manifest.shards[number]

        def read() -> bytes:
            with (self.folder / shard.name).open("rb") as file:
                return file.read(num_bytes)

        try:
            return of_file(read, self.folder / shard.name, PATIENCE_AT_START)
        except DataAway as error:
            raise self._of_shard(error, shard) from error

    def _of_shard(self, error: DataAway, shard: Shard) -> DataError:
        """The error of a shard that is damaged, alone; raises DataAway where the whole file system fails, or gives
        nothing of any shard, though it remembers the manifest: the next shard would be waited for as long."""
        of_file((self.folder / MANIFEST_NAME).stat, self.folder, PATIENCE_AT_START)
        shards = self.manifest.shards
        looked_at = (shard, *shards[:: -(-len(shards) // OTHERS)])
        if any(can_be_read_elsewhere(self.folder / one.name, one.num_bytes) for one in looked_at):
            return DataError(str(error))
        raise error

    def _require(self, shard: Shard) -> None:
        of_file(lambda: require_shard(self.folder, shard), self.folder / shard.name, PATIENCE_AT_START)

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

    def read(self, shard: int, index: int, *, is_patient: bool = True) -> tuple[str, dict[str, bytes]]:
        """Key and members (extension -> content) of one sample of one shard; who is not patient gets the first
        OSError."""
        record = self._files.record(shard, index, is_patient=is_patient)
        try:
            return read_members(record)
        except BadSample as error:
            raise BadSample(error.reason, f"{self._files.path(shard)}, sample {index}: {error}") from error

    def close(self) -> None:
        self._files.close()
        if self._remote is not None:
            self._remote.close()


def read_manifest(place: Place) -> Manifest:
    """The manifest of a data set in a folder or behind a URL, whose shards are not looked at; errors as
    `ShardFolder`."""
    return ShardFolder(place, checked=NONE).manifest
