"""How do two data sets differ? By their manifests: settings and shards; and when asked, sample by sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.doctor.finished import BadDataSet, manifest_at, require_shards
from data_prep.doctor.members import read_keys, samples_of
from data_prep.doctor.pool import each
from data_prep.places import Place
from data_prep.progress import progress_bar
from data_prep.schema import Manifest, Shard

MOST_KEYS = 1000  # told of each kind
FIELDS = ("name", "split", "num_samples", "has_text", "has_category")


@dataclass(frozen=True)
class SampleDiff:
    """How many samples differ, and keys of the first MOST_KEYS of them."""

    num_same: int
    num_added: int
    num_removed: int
    num_changed: int  # same key, another image
    num_relabelled: int  # same key and image, another caption, category or record
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    relabelled: tuple[str, ...]


@dataclass(frozen=True)
class Diff:
    """Everything by which the second data set differs from the first."""

    fields: dict[str, tuple[Any, Any]]  # of the manifest and of its builder's settings: what each says
    same: int  # shards of the same name and bytes
    moved: tuple[tuple[str, str], ...]  # the same bytes under another name
    changed: tuple[str, ...]  # names of shards
    added: tuple[str, ...]
    removed: tuple[str, ...]
    samples: SampleDiff | None  # None when they were not asked for

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return not (self.fields or self.moved or self.changed or self.added or self.removed)

    def record(self) -> dict[str, Any]:
        """The difference as JSON types."""
        record = {name: getattr(self, name) for name in ("moved", "changed", "added", "removed")}
        fields = {name: list(pair) for name, pair in self.fields.items()}
        samples = vars(self.samples) if self.samples else None
        return {"is_same": self.is_same, "fields": fields, "same": self.same, **record, "samples": samples}


def diff(first: Place, second: Place, with_samples: bool, workers: int) -> Diff:
    """Compare two data sets; only shards that differ are read, and only with samples.

    Raises FileNotFoundError and BadDataSet for what is no data set. Memory with samples: 160 bytes for each of those
    of the shards that differ.
    """
    one, other = manifest_at(first), manifest_at(second)
    require_shards(first, one)
    require_shards(second, other)
    before, after = _by_name(one), _by_name(other)
    same = {name for name, shard in before.items() if name in after and after[name].sha256 == shard.sha256}
    where = {shard.sha256: name for name, shard in after.items() if name not in same}
    moved = {
        name: where[shard.sha256]
        for name, shard in before.items()
        if name not in same and shard.sha256 in where
    }
    taken = same | set(moved)
    given = same | set(moved.values())
    changed = sorted(name for name in before.keys() & after.keys() if name not in taken and name not in given)
    samples = None
    if with_samples:
        sides = (
            _Side(first, tuple(shard for shard in one.shards if shard.name not in taken)),
            _Side(second, tuple(shard for shard in other.shards if shard.name not in given)),
        )
        samples = _samples(*sides, sum(before[name].num_samples for name in taken), workers)
    return Diff(
        fields=dict(_fields(one, other)),
        same=len(same),
        moved=tuple(sorted(moved.items())),
        changed=tuple(changed),
        added=tuple(sorted(after.keys() - given - set(changed))),
        removed=tuple(sorted(before.keys() - taken - set(changed))),
        samples=samples,
    )


def _by_name(manifest: Manifest) -> dict[str, Shard]:
    return {shard.name: shard for shard in manifest.shards}


def _fields(one: Manifest, other: Manifest) -> Iterator[tuple[str, tuple[Any, Any]]]:
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in FIELDS}
    pairs["dropped"] = (dict(one.dropped), dict(other.dropped))
    for name in ("categories", "tags"):
        a, b = getattr(one, name), getattr(other, name)
        if a != b:
            both = sorted(set(a) ^ set(b))
            told = f"; of one alone: {', '.join(both[:5])}" if both else "; in another order"
            pairs[name] = (f"{len(a)} names{told}", f"{len(b)} names")
    for name in sorted(one.builder.keys() | other.builder.keys()):
        pairs[f"builder.{name}"] = (one.builder.get(name), other.builder.get(name))
    yield from ((name, pair) for name, pair in pairs.items() if pair[0] != pair[1])


@dataclass(frozen=True)
class _Side:
    """The shards of one data set that are read."""

    place: Place
    shards: tuple[Shard, ...]

    def keys(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """The keys of some samples, by their number over all shards."""
        starts = np.cumsum([0, *(shard.num_samples for shard in self.shards)])
        found: list[str] = []
        for at, shard in enumerate(self.shards):
            inside = [number - int(starts[at]) for number in numbers if starts[at] <= number < starts[at + 1]]
            found += read_keys(self.place, shard.name, inside) if inside else []
        return tuple(found)


@dataclass(frozen=True)
class _Table:
    """Hashes of every sample of a side, uint64 [n] each."""

    key: np.ndarray
    image: np.ndarray
    record: np.ndarray  # of the .json, which has the checksums of all else


def _samples(one: _Side, other: _Side, num_same: int, workers: int) -> SampleDiff:
    before, after = _read(one, workers), _read(other, workers)
    _, left, right = np.intersect1d(before.key, after.key, return_indices=True)
    image = before.image[left] != after.image[right]
    record = (before.record[left] != after.record[right]) & ~image
    removed = np.setdiff1d(np.arange(len(before.key)), left)
    added = np.setdiff1d(np.arange(len(after.key)), right)
    changed, relabelled = np.sort(right[image]), np.sort(right[record])
    return SampleDiff(
        num_same=num_same + len(left) - len(changed) - len(relabelled),
        num_added=len(added),
        num_removed=len(removed),
        num_changed=len(changed),
        num_relabelled=len(relabelled),
        added=other.keys(added[:MOST_KEYS].tolist()),
        removed=one.keys(removed[:MOST_KEYS].tolist()),
        changed=other.keys(changed[:MOST_KEYS].tolist()),
        relabelled=other.keys(relabelled[:MOST_KEYS].tolist()),
    )


def _read(side: _Side, workers: int) -> _Table:
    total = sum(shard.num_samples for shard in side.shards)
    parts: dict[int, np.ndarray] = {0: np.empty((3, 0), np.uint64)}
    tasks = [(side.place, shard) for shard in side.shards]
    with (
        progress_bar(total, f"diff {side.place.name}", "sample") as bar,
        closing(each(_read_shard, tasks, min(workers, max(1, len(tasks))), bar.update)) as results,
    ):
        for number, hashes in results:
            parts[number] = hashes
    key, image, record = np.concatenate([part for _, part in sorted(parts.items())], axis=1)
    if len(np.unique(key)) != len(key):
        raise BadDataSet(f"{side.place}: a key is there twice: run `python -m data_prep check {side.place}`")
    return _Table(key, image, record)


def _read_shard(task: tuple[Place, Shard], tick: Callable[[], None]) -> np.ndarray:
    """Hashes of key, image and record of every sample, uint64 [3, n]."""
    place, shard = task
    rows = []
    try:
        with place.open(shard.name) as file:
            for key, sample in samples_of(file):
                image = int(json.loads(sample[-1].content)["sha256"][:16], 16)
                rows.append((_hash(key.encode()), image, _hash(sample[-1].content)))
                tick()
    except (BadDataSet, FileNotFoundError, ValueError, KeyError, RecursionError) as error:
        raise BadDataSet(f"{place}/{shard.name}: {error}: run `python -m data_prep check {place}`") from error
    if len(rows) != shard.num_samples:
        raise BadDataSet(
            f"{place}/{shard.name} holds {len(rows)} samples, the manifest says {shard.num_samples}: run"
            f" `python -m data_prep check {place}`"
        )
    return np.array(rows, np.uint64).T


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def as_text(found: Diff, most: int = 10) -> str:
    """The difference in a few lines; at most so many names of each kind."""
    lines = [
        f"{name}: {json.dumps(a, ensure_ascii=False)} -> {json.dumps(b, ensure_ascii=False)}"
        for name, (a, b) in found.fields.items()
    ]
    moved = [f"{a} -> {b}" for a, b in found.moved]
    kinds = {"changed": found.changed, "added": found.added, "removed": found.removed, "renamed": moved}
    lines.append(
        f"shards: {found.same:,} same, "
        + ", ".join(f"{len(names):,} {kind}" for kind, names in kinds.items())
    )
    lines += [f"  {kind}: {_some(names, most)}" for kind, names in kinds.items() if names]
    if (samples := found.samples) is not None:
        lines.append(
            f"samples: {samples.num_same:,} same, {samples.num_changed:,} with another image,"
            f" {samples.num_relabelled:,} with another record, {samples.num_added:,} added,"
            f" {samples.num_removed:,} removed"
        )
        for kind in ("changed", "relabelled", "added", "removed"):
            if keys := getattr(samples, kind):
                lines.append(f"  {kind}: {_some(keys, most)}")
    return "\n".join(lines)


def _some(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
