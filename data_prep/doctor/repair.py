"""How is a damaged data set mended? Bad shards are copied from a mirror or built again; the manifest never changes.

The SHA-256 of a shard in the manifest is the proof: what does not have it is never put in place.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from data_prep.claim import WORK_FOLDER, claimed
from data_prep.doctor.finished import BadDataSet, data_sets, index_at, manifest_at, require_file
from data_prep.doctor.members import Hashed, Readable, samples_of
from data_prep.doctor.pool import each
from data_prep.index import index_bytes, index_path
from data_prep.places import Place
from data_prep.plan import settings_of, shard_ranges
from data_prep.progress import progress_bar
from data_prep.samples import Collection, json_bytes
from data_prep.schema import TOKENIZER_FOLDER, Manifest, Shard
from data_prep.shard import Work, build_shard
from data_prep.tokenizer import copy_tokenizer, train_tokenizer

AT_ONCE = 2**22  # bytes read at a time

# Makes a shard of a data set, as a file in the folder; raises what tells why it cannot.
Remake = Callable[[Shard, Path], Path]


@dataclass(frozen=True)
class Damage:
    """What of a data set is not as it was built."""

    shards: tuple[Shard, ...]  # missing, or with other bytes
    indices: tuple[Shard, ...]  # the shard is good, its index is not
    has_bad_tokenizer: bool

    @property
    def is_none(self) -> bool:
        """Whether all is well."""
        return not (self.shards or self.indices or self.has_bad_tokenizer)


@dataclass(frozen=True)
class Repaired:
    """What was mended, and what could not be."""

    shards: tuple[str, ...]
    indices: tuple[str, ...]
    has_new_tokenizer: bool
    failed: tuple[tuple[str, str], ...]  # file and why


def damage_of(place: Place, workers: int) -> Damage:
    """Read every shard and compare it with the manifest; FileNotFoundError or BadDataSet without a manifest."""
    manifest = manifest_at(place)
    verdicts: dict[int, str] = {}
    tasks = [(place, shard) for shard in manifest.shards]
    total = sum(shard.num_bytes for shard in manifest.shards) >> 20
    with (
        progress_bar(total, f"repair {place.name}: looks", "MiB") as bar,
        closing(each(_look, tasks, min(workers, len(tasks)), lambda _: None)) as results,
    ):
        for number, verdict in results:
            verdicts[number] = verdict
            bar.update(manifest.shards[number].num_bytes >> 20)
    return Damage(
        tuple(shard for number, shard in enumerate(manifest.shards) if verdicts[number] == "shard"),
        tuple(shard for number, shard in enumerate(manifest.shards) if verdicts[number] == "index"),
        manifest.has_text and not _has_tokenizer(place),
    )


def _look(task: tuple[Place, Shard], tick: Callable[[], None]) -> str:
    """What of a shard is bad: "shard", "index", or "" for nothing."""
    place, shard = task
    try:
        if place.size(shard.name) != shard.num_bytes:
            return "shard"
        with place.open(shard.name) as opened:
            file = Hashed(opened)
            offsets = offsets_of(file)
    except (FileNotFoundError, BadDataSet):
        return "shard"
    if file.hash.hexdigest() != shard.sha256:
        return "shard"
    try:
        return "" if index_at(place, shard.name).tolist() == offsets else "index"
    except BadDataSet:
        return "index"


def offsets_of(file: Readable) -> list[int]:
    """Where the samples of a shard start, and where the last ends, in bytes."""
    return [0, *(sample[-1].end for _, sample in samples_of(file))]


def _has_tokenizer(place: Place) -> bool:
    try:
        Tokenizer.from_str(place.child(TOKENIZER_FOLDER).read("tokenizer.json").decode("utf-8"))
    except Exception:  # the library raises plain Exception for a broken file
        return False
    return True


def repair(place: Place, damage: Damage, remake: Remake, tokenizer: Callable[[], None] | None) -> Repaired:
    """Put good shards in the place of bad ones, each proved by its SHA-256; indices are made from the shards.

    `tokenizer` writes that of the data set, after the shards; None leaves it. What fails is told, the rest is mended.
    """
    mended: list[str] = []
    failed: list[tuple[str, str]] = []
    indices: list[str] = []
    with claimed(place), tempfile.TemporaryDirectory(prefix="repair-", dir=_beside(place)) as folder:
        with progress_bar(len(damage.shards), f"repair {place.name}", "shard") as bar:
            for shard in damage.shards:
                try:
                    path = remake(shard, Path(folder))
                    _put(place, shard, path)
                    mended.append(shard.name)
                except (BadDataSet, FileNotFoundError) as error:
                    failed.append((shard.name, str(error)))
                except IsADirectoryError as error:
                    failed.append((shard.name, _told_of_folder(error)))
                bar.update()
        for shard in damage.indices:
            name = index_path(shard.name).name
            try:
                with place.open(shard.name) as file:
                    place.write(name, index_bytes(offsets_of(file)))
                indices.append(shard.name)
            except IsADirectoryError as error:
                failed.append((shard.name, _told_of_folder(error)))
        has_new = False
        if damage.has_bad_tokenizer and tokenizer is not None and not failed:
            tokenizer()
            has_new = True
        elif damage.has_bad_tokenizer:
            failed.append((TOKENIZER_FOLDER, "it does not load; it is made when all shards are good"))
    place.remove_folder(WORK_FOLDER)  # the claim's
    return Repaired(tuple(mended), tuple(indices), has_new, tuple(failed))


def _beside(place: Place) -> Path | None:
    """Where shards are made: on the disk of the data set, or that of temporary files."""
    return None if place.local is None else place.local / WORK_FOLDER


def _put(place: Place, shard: Shard, path: Path) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard.sha256:
            raise BadDataSet(
                f"what was made for it has the sha256 {digest}, the manifest says {shard.sha256}: the source, its"
                " settings or the version of a library differ from those of the build; copy it from a mirror"
            )
        file.seek(0)
        offsets = offsets_of(file)
    place.write(index_path(shard.name).name, index_bytes(offsets))
    place.move(shard.name, path)


def _told_of_folder(error: IsADirectoryError) -> str:
    """Of a folder that a file was to replace."""
    name = Path(error.filename2 or error.filename).name
    return f"{name} is a folder where a file must be: remove that folder first"


def from_mirror(mirror: Place) -> Remake:
    """Copies a shard of another place."""

    def copy(shard: Shard, folder: Path) -> Path:
        path = folder / shard.name
        try:
            require_file(mirror, shard.name)
            with mirror.open(shard.name) as source, open(path, "wb") as target:
                while piece := source.read(AT_ONCE):
                    target.write(piece)
        except FileNotFoundError as error:
            raise BadDataSet(f"{mirror} has no such shard either: name another mirror") from error
        except BadDataSet as error:
            raise BadDataSet(f"{mirror}: {error}") from error
        return path

    return copy


def from_source(collection: Collection, manifest: Manifest) -> Remake:
    """Builds a shard of a collection again, which must be the one that the data set was built from.

    Raises ValueError naming the settings or fingerprints that differ.
    """
    there = dict(manifest.builder)
    given = settings_of(
        collection,
        there["shard_size"] if isinstance(there.get("shard_size"), int) else 0,
        there.get("vocab_size", 0),
        there.get("limit", 0),
    )
    given = json.loads(json_bytes(given))
    if given != there:
        differing = sorted(name for name in given.keys() | there.keys() if given.get(name) != there.get(name))
        pairs = ", ".join(
            f"{name}: {there.get(name)!r} built, {given.get(name)!r} given" for name in differing
        )
        raise ValueError(
            f"the source is not what {manifest.name}/{manifest.split} was built from ({pairs}): give the same source"
            " with the same settings, or copy from a mirror: `repair DIR mirror --from PLACE`"
        )
    size = there["shard_size"] if isinstance(there["shard_size"], int) else 1
    ranges = shard_ranges(collection, size, there.get("limit", 0))

    def make(shard: Shard, folder: Path) -> Path:
        number = int(Path(shard.name).stem)
        if number >= len(ranges):
            raise BadDataSet(f"the source gives {len(ranges)} shards, none of the number {number}")
        items = collection.items[ranges[number].start : ranges[number].stop]
        output = folder / "output"
        build_shard(Work(str(output), str(folder / "work"), number, items, collection.make), lambda: None)
        return output / shard.name

    return make


def tokenizer_of(place: Place, manifest: Manifest, teacher: Place | None) -> Callable[[], None]:
    """Writes the tokenizer of a data set: that of the split which taught it, or learned from its own captions."""
    if teacher is not None:
        return partial(copy_tokenizer, teacher, place)
    names = [shard.name for shard in manifest.shards]
    return partial(train_tokenizer, place, names, manifest.builder["vocab_size"])


@dataclass(frozen=True)
class Job:
    """A data set to mend and what makes its parts."""

    place: Place
    remake: Remake
    tokenizer: Callable[[], None] | None  # None: it cannot be made of what is given


def jobs_from_mirror(place: Place, mirror: Place) -> list[Job]:
    """A job of every data set at a place, with that of the same folder at the mirror."""
    jobs = []
    for target in data_sets(place):
        source = mirror if target == place else mirror.child(target.name)
        jobs.append(Job(target, from_mirror(source), partial(copy_tokenizer, source, target)))
    return jobs


def jobs_from_source(place: Place, collections: Sequence[Collection]) -> list[Job]:
    """A job of every data set at a place, which must be a whole build of the source, or one split of it."""
    is_single = len(collections) == 1 and not collections[0].has_split_folder
    targets = {target: manifest_at(target) for target in data_sets(place)}
    jobs, teacher = [], None
    for collection in collections:
        target = place if is_single or place in targets else place.child(collection.split)
        manifest = targets.get(target)
        if manifest is None or manifest.split != collection.split:
            continue
        jobs.append(Job(target, from_source(collection, manifest), tokenizer_of(target, manifest, teacher)))
        if teacher is None and manifest.has_text:
            teacher = target
    if left := sorted(target.name for target in targets if target not in {job.place for job in jobs}):
        raise ValueError(
            f"the source gives no split for {left} of {place}, only"
            f" {sorted(collection.split for collection in collections)}: name the source of that data set"
        )
    return jobs
