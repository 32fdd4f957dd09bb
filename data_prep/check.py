"""Is a data set still what was built? Every byte is read again; all shards at fault are named, with their members."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_prep.doctor.finished import BadDataSet, index_at, manifest_at, require_file
from data_prep.doctor.members import Hashed, samples_of
from data_prep.doctor.pool import each
from data_prep.doctor.verify import verify_sample
from data_prep.places import Place, place_of
from data_prep.progress import progress_bar
from data_prep.schema import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest, Shard, counts_by_reason

REMEDY = "copy the data set again, run `python -m data_prep repair`, or remove the folder and build it again"
MOST_FAULTS = 100  # listed of one shard; the rest is counted


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was built."""

    where: str  # file of the data set
    problem: str  # with the member, where there is one


@dataclass(frozen=True)
class Report:
    """What a check found in one data set."""

    place: str
    manifest: Manifest
    faults: tuple[Fault, ...]
    num_more: int  # faults beyond those that are listed
    num_phash: int  # samples whose perceptual hash was computed again and agreed
    is_complete: bool  # False when it stopped at the first bad shard

    @property
    def bad_shards(self) -> list[str]:
        """Names of the shards at fault, in order."""
        named = {shard.name for shard in self.manifest.shards}
        return sorted({fault.where for fault in self.faults} & named)

    def record(self) -> dict:
        """The report as JSON types."""
        return {
            "place": self.place,
            "name": self.manifest.name,
            "split": self.manifest.split,
            "num_samples": self.manifest.num_samples,
            "num_items": self.manifest.num_items,
            "num_shards": len(self.manifest.shards),
            "is_good": not self.faults,
            "is_complete": self.is_complete,
            "bad_shards": self.bad_shards,
            "faults": [asdict(fault) for fault in self.faults],
            "num_more_faults": self.num_more,
            "num_phash_verified": self.num_phash,
        }


def check(folder: Path | Place) -> Manifest:
    """The manifest of a data set of which every byte is as built; BadDataSet names the first fault."""
    place = folder if isinstance(folder, Place) else place_of(folder)
    report = examine(place, workers=1, only_first=True)
    for fault in report.faults[:1]:
        raise BadDataSet(f"{place}/{fault.where}: {fault.problem}: {REMEDY}")
    return report.manifest


def examine(place: Place, workers: int, only_first: bool = False) -> Report:
    """Everything that is wrong with a data set.

    Raises BadDataSet for a manifest that cannot be read, FileNotFoundError without one. Memory: 8 bytes a sample.
    """
    manifest = manifest_at(place)
    tasks = [_task(place, manifest, shard) for shard in manifest.shards]
    faults: dict[int, tuple[Fault, ...]] = {}
    keys, num_keys = np.empty(manifest.num_samples, np.uint64), 0
    extensions: Counter[str] = Counter()
    num_more = num_phash = 0
    with (
        progress_bar(manifest.num_samples, f"check {place.name}", "sample") as bar,
        closing(each(_examine_shard, tasks, min(workers, len(tasks)), bar.update)) as results,
    ):
        for number, found in results:
            faults[number] = found.faults
            some = found.keys[: manifest.shards[number].num_samples]
            keys[num_keys : num_keys + len(some)] = some
            num_keys += len(some)
            extensions.update(found.extensions)
            num_more += found.num_more
            num_phash += found.num_phash
            if found.faults and only_first:
                break
    listed = [fault for _, some in sorted(faults.items()) for fault in some]
    is_complete = len(faults) == len(tasks)
    if is_complete:
        listed += _shared_keys(place, manifest, keys[:num_keys])
        if not listed:
            listed += _unpromised(manifest, extensions)
        listed += _around(place, manifest)
    return Report(str(place), manifest, tuple(listed), num_more, num_phash, is_complete)


def examine_shard(place: Place, manifest: Manifest, name: str) -> tuple[Fault, ...]:
    """What is wrong with one shard of a data set, which the manifest must name."""
    shard = next(shard for shard in manifest.shards if shard.name == name)
    return _examine_shard(_task(place, manifest, shard), lambda: None).faults


@dataclass(frozen=True)
class _Task:
    place: Place
    shard: Shard
    manifest: Manifest


def _task(place: Place, manifest: Manifest, shard: Shard) -> _Task:
    """With a manifest of this shard alone: tens of thousands of tasks are sent to other processes."""
    return _Task(place, shard, replace(manifest, shards=(shard,), num_samples=shard.num_samples))


@dataclass(frozen=True)
class _Found:
    faults: tuple[Fault, ...]
    num_more: int
    keys: np.ndarray  # uint64, hashes
    extensions: dict[str, int]
    num_phash: int


def _examine_shard(task: _Task, tick: Callable[[], None]) -> _Found:
    shard = task.shard
    problems: list[str] = []
    keys: set[str] = set()
    extensions: Counter[str] = Counter()
    offsets, num_phash = [0], 0
    try:
        require_file(task.place, shard.name)
        with task.place.open(shard.name) as opened:
            file = Hashed(opened)
            for key, sample in samples_of(file):
                try:
                    if key in keys:
                        raise BadDataSet(f"member {sample[0].name}: its key was there before")
                    keys.add(key)
                    num_phash += verify_sample(key, sample, task.manifest)
                except BadDataSet as error:
                    problems.append(str(error))
                extensions.update(member.extension for member in sample)
                offsets.append(sample[-1].end)
                tick()
        if not problems:
            problems += _whole_shard(task, offsets, file)
    except FileNotFoundError:
        problems.append("the shard is missing, the manifest names it")
    except BadDataSet as error:
        problems.append(str(error))
    faults = tuple(Fault(shard.name, problem) for problem in problems[:MOST_FAULTS])
    hashes = np.array([_hash_of_key(key) for key in keys], np.uint64)
    return _Found(faults, len(problems) - len(faults), hashes, dict(extensions), num_phash)


def _whole_shard(task: _Task, offsets: list[int], file: Hashed) -> list[str]:
    """What is wrong with a shard though every member of it is well."""
    shard, problems = task.shard, []
    if len(offsets) - 1 != shard.num_samples:
        problems.append(f"it holds {len(offsets) - 1} samples, the manifest says {shard.num_samples}")
    try:
        if offsets != index_at(task.place, shard.name).tolist():
            problems.append(f"{shard.name}.idx does not say where the samples of the shard start")
    except BadDataSet as error:
        problems.append(str(error))
    if file.num_bytes != shard.num_bytes:
        problems.append(f"it has {file.num_bytes} bytes, the manifest says {shard.num_bytes}")
    elif (digest := file.hash.hexdigest()) != shard.sha256:
        problems.append(
            f"its sha256 is {digest}, the manifest says {shard.sha256}, though every member reads well"
        )
    return problems


def _hash_of_key(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _shared_keys(place: Place, manifest: Manifest, hashes: np.ndarray) -> list[Fault]:
    """Keys that two shards hold: hashes, which are sorted here, say whether there are any; then all keys are read."""
    hashes.sort()
    doubled = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not doubled:
        return []
    seen: dict[str, str] = {}
    faults = []
    for shard in manifest.shards:
        for key in _keys_of(place, shard):
            if _hash_of_key(key) not in doubled:
                continue
            if key in seen:
                faults.append(Fault(shard.name, f"member {key}: its key was there before, in {seen[key]}"))
            seen.setdefault(key, shard.name)
    return faults


def _keys_of(place: Place, shard: Shard) -> Iterator[str]:
    """The keys of a shard, as far as it can be read: what is wrong with it is told already."""
    try:
        require_file(place, shard.name)
        with place.open(shard.name) as file:
            yield from (key for key, _ in samples_of(file))
    except (BadDataSet, FileNotFoundError):
        return


def _unpromised(manifest: Manifest, extensions: Counter[str]) -> list[Fault]:
    return [
        Fault(
            MANIFEST_NAME,
            f"{field}=false, but every sample has a .{extension}: copy the manifest again",
        )
        for field, extension in {"has_text": "txt", "has_category": "cls"}.items()
        if not getattr(manifest, field) and extensions[extension] == manifest.num_samples
    ]


def _around(place: Place, manifest: Manifest) -> list[Fault]:
    """What is wrong beside the shards: tars that do not belong there, the tokenizer, the list of drops."""
    named = {shard.name for shard in manifest.shards}
    faults = [
        Fault(name, "it is not in the manifest: remove it")
        for name in place.names("*.tar")
        if name not in named
    ]
    if manifest.has_text:
        name = f"{TOKENIZER_FOLDER}/tokenizer.json"
        try:
            Tokenizer.from_str(place.child(TOKENIZER_FOLDER).read("tokenizer.json").decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for a broken file
            faults.append(Fault(name, f"the {TOKENIZER_FOLDER} does not load ({error})"))
    return faults + _uncounted(manifest) + _left_out(place, manifest)


def _uncounted(manifest: Manifest) -> list[Fault]:
    """Every input must be in a shard or among what was left out; nothing is known where items were not counted."""
    if manifest.num_items is None or any(shard.num_items is None for shard in manifest.shards):
        return []
    told = counts_by_reason(manifest)
    more = {reason: count for reason, count in told.items() if count > manifest.dropped.get(reason, 0)}
    if more:
        return [Fault(MANIFEST_NAME, f"its shards count {more} left out, it says {dict(manifest.dropped)}")]
    elsewhere = manifest.num_items - sum(shard.num_items for shard in manifest.shards)
    rest = sum(manifest.dropped.values()) - sum(told.values())
    if elsewhere > rest:
        problem = f"{elsewhere} of {manifest.num_items} items are in none of its shards, {rest} of them with a reason"
        return [Fault(MANIFEST_NAME, problem)]
    return []


def _left_out(place: Place, manifest: Manifest) -> list[Fault]:
    """A list of what was left out must count what the manifest counts; without a list nothing is known."""
    name = "dropped.jsonl"
    if not place.exists(name):
        return []
    try:
        with place.open(name) as file:
            counts = Counter(json.loads(line)["reason"] for line in file)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return [Fault(name, f"it is no list of what was left out ({error!r})")]
    if counts != Counter(dict(manifest.dropped)):
        told = ", ".join(f"{reason} {count}" for reason, count in islice(sorted(counts.items()), 20))
        return [Fault(name, f"it counts {told or 'nothing'}, the manifest {dict(manifest.dropped)}")]
    return []
