"""How does a collection become a data set? Shard by shard, resumable, on disk or behind a URL, the manifest last.

The bytes depend on the settings and the input alone, and neither on the place, the engine, the number of workers nor
on interruptions; those of a download on what the servers answered as well. Several builders may make a part of the
shards each; whoever finds all of them finished writes what belongs to the whole.
"""

from __future__ import annotations

import errno
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from data_prep.claim import WORK_FOLDER, Require, agree, claimed
from data_prep.engines import ENGINES
from data_prep.output import begin, clean, explained, is_complete, remove_work, require_space
from data_prep.places import Place, is_url, place_of
from data_prep.plan import WHOLE, Part, part_of, settings_of, shard_ranges
from data_prep.progress import shard_progress
from data_prep.samples import Collection, release
from data_prep.schema import MANIFEST_NAME, Manifest, manifest_bytes
from data_prep.shard import Finished, Work, changed_shards, dropped_name, finished_shards
from data_prep.tokenizer import copy_tokenizer, train_tokenizer

DROPPED_NAME = "dropped.jsonl"
MOST_ITEMS = 100_000  # of a shard: one worker makes it, and a death loses it


@dataclass(frozen=True)
class Options:
    """How to build, whatever the source."""

    shard_size: int = 500  # items a shard
    workers: int = 2  # processes, or tasks at once of another engine; 1 builds in this process
    max_bad: float = 0.01  # fraction of the items that may be bad before the build stops, in [0, 1]
    vocab_size: int = 8192  # at most so many words in the tokenizer
    engine: str = "local"  # who builds: local, ray or spark
    part: str = ""  # I/N: make the I-th of N shares of the shards; slurm: that of this task of an array
    # folder on a disk of this machine where shards are made; if empty in a local output, else in a temporary folder
    work: str = ""
    limit: int = 0  # items of each split, to try; 0 is all

    def __post_init__(self) -> None:
        if not 1 <= self.shard_size <= MOST_ITEMS:
            raise ValueError(
                f"shard_size={self.shard_size} must lie in [1, {MOST_ITEMS}], and a shard be some 100 MB: pass"
                " --shard-size 500"
            )
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1: pass --workers 2")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad={self.max_bad} is a fraction in [0, 1]: pass --max-bad 0.01")
        if self.vocab_size < 64:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 64: pass --vocab-size 8192")
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is unknown; choose from {sorted(ENGINES)}")
        if self.limit < 0:
            raise ValueError(f"limit={self.limit} must not be negative: pass --limit 1000, or 0 for all")
        if is_url(self.work):
            raise ValueError(f"work={self.work!r} is a URL, shards are made on a disk: pass --work FOLDER")
        if self.part:
            part_of(self.part)


@dataclass(frozen=True)
class Share:
    """How far one builder of several came."""

    part: Part
    num_own: int  # shards of this part, all finished
    num_finished: int  # shards of all parts that are finished
    num_shards: int


def build(
    collection: Collection,
    out: Place | Path | str,
    options: Options,
    tokenizer_from: Place | Path | None = None,
) -> bool:
    """Build one data set into `out`, going on where an earlier run stopped; False when it was complete already.

    A tokenizer is trained from the captions, or copied from the data set `tokenizer_from`.
    Raises ValueError (other settings in the same folder, too many bad items), FileExistsError (foreign files, another
    builder) and OSError (no space left, a store that fails); nothing unfinished ever carries a final name.
    """
    place, settings = place_of(out), _settings(collection, options)
    if is_complete(place, settings):
        return False
    begin(place, settings)
    with claimed(place) as require:
        if is_complete(place, settings):  # since
            return False
        clean(place, work_folder(place, options))
        finished = _build_shards(collection, place, options, WHOLE, require)
        _finish(collection, place, options, tokenizer_from, finished, require)
    place.remove_folder(WORK_FOLDER)
    return True


def build_part(collection: Collection, out: Place | Path | str, options: Options) -> Share:
    """Build the share of the shards that `options.part` names; other builders of the same parts may run meanwhile.

    Raises as `build` does. When every share is finished, `finish` makes the data set of them.
    """
    place, settings, part = place_of(out), _settings(collection, options), part_of(options.part)
    ranges = shard_ranges(collection, options.shard_size, options.limit)
    own = [number for number in range(len(ranges)) if part.owns(number)]
    if is_complete(place, settings):
        return Share(part, len(own), len(ranges), len(ranges))
    begin(place, settings)
    agree(place, part)
    with claimed(place, part) as require:
        agree(place, part)  # again: of two at once one wrote last
        remove_work(work_folder(place, options, part))  # of this part when it was killed
        finished = _build_shards(collection, place, options, part, require)
        _require_good(collection, place, options, finished)
        remove_work(work_folder(place, options, part))
    num_finished = len(finished_shards(place, range(len(ranges))))
    return Share(part, len(own), num_finished, len(ranges))


def work_folder(place: Place, options: Options, part: Part = WHOLE) -> Path:
    """Where on this machine the shards of a place are made: one folder a place and part."""
    name = "work" if part == WHOLE else f"work-{part.index}-of-{part.count}"
    if not options.work and place.local is not None:
        return place.local / WORK_FOLDER / name
    above = Path(options.work or tempfile.gettempdir())
    return above / f"data_prep-{sha256(str(place).encode()).hexdigest()[:16]}" / name


def _settings(collection: Collection, options: Options) -> dict[str, object]:
    return settings_of(collection, options.shard_size, options.vocab_size, options.limit)


def _build_shards(
    collection: Collection, place: Place, options: Options, part: Part, require: Require
) -> dict[int, Finished]:
    """Every shard of a part by its number; those an earlier run finished are taken as they are."""
    ranges = shard_ranges(collection, options.shard_size, options.limit)
    own = [number for number in range(len(ranges)) if part.owns(number)]
    finished = finished_shards(place, own)
    todo = [number for number in own if number not in finished]
    for number in finished:  # for a builder that was killed before it could
        release(collection.items[ranges[number].start : ranges[number].stop])
    folder = work_folder(place, options, part)
    num_todo = sum(len(ranges[number]) for number in todo)
    require_space(collection, place, folder, num_todo, min(len(todo), options.workers), options.shard_size)
    limit = options.max_bad * sum(map(len, ranges))
    num_items = sum(len(ranges[number]) for number in own)

    def work_of(number: int) -> Work:
        items = collection.items[ranges[number].start : ranges[number].stop]
        return Work(str(place), str(folder), number, items, collection.make, require)

    what = f"{collection.name}/{collection.split}" + (f" part {part}" if part != WHOLE else "")
    with (
        shard_progress(num_items, what, len(own), num_items - num_todo) as progress,
        explained(place, folder),
    ):
        for done in finished.values():
            progress.finish(done.dropped)
        num_bad = sum(done.num_bad for done in finished.values())
        if num_bad <= limit and todo and collection.prepare is not None:
            collection.prepare([ranges[number] for number in todo])
            require()
        for number, done in ENGINES[options.engine](todo, work_of, options.workers, progress.advance):
            finished[number] = done
            progress.finish(done.dropped)
            num_bad += done.num_bad
            if num_bad > limit:
                break  # no good end is possible any more; the caller says so
        else:
            assert len(finished) == len(own), "a shard got lost"
    return dict(sorted(finished.items()))


def finish(
    collection: Collection,
    out: Place | Path | str,
    options: Options,
    tokenizer_from: Place | Path | None = None,
) -> bool:
    """Make one data set of shards that are all finished; False when another builder has done so meanwhile.

    Raises FileNotFoundError when a shard is missing, and as `build` does.
    """
    place, settings = place_of(out), _settings(collection, options)
    with claimed(place, wait=True) as require:
        if is_complete(place, settings):
            return False
        ranges = shard_ranges(collection, options.shard_size, options.limit)
        finished = finished_shards(place, range(len(ranges)))
        if missing := [number for number in range(len(ranges)) if number not in finished]:
            raise FileNotFoundError(
                f"{place} lacks {len(missing)} of {len(ranges)} shards, the first is number {missing[0]}: build its "
                "part again, or all that is missing by the same command without --part"
            )
        _finish(collection, place, replace(options, part=""), tokenizer_from, finished, require)
    place.remove_folder(WORK_FOLDER)
    return True


def _finish(
    collection: Collection,
    place: Place,
    options: Options,
    tokenizer_from: Place | Path | None,
    finished: Mapping[int, Finished],
    require: Require,
) -> None:
    """Write what belongs to the whole: what was left out, the tokenizer, and last the manifest."""
    require()
    if changed := changed_shards(place, finished):
        raise OSError(
            errno.ESTALE,
            f"{place}: shards {changed[:5]} are no longer what this builder counted, another one wrote them: run the "
            "same command again, it makes them anew",
        )
    _require_good(collection, place, options, finished)
    with explained(place, work_folder(place, options)):
        _write_dropped(place, finished)
        good = [done for done in finished.values() if done.shard is not None]
        total = sum(done.shard.num_samples for done in good)
        num_text = sum(done.num_text for done in good)
        if num_text and tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, place)
        elif num_text:
            train_tokenizer(place, [done.shard.name for done in good], options.vocab_size)
        manifest = Manifest(
            name=collection.name,
            split=collection.split,
            categories=tuple(collection.categories),
            num_samples=total,
            has_text=num_text == total > 0,
            has_category=bool(collection.categories) and sum(done.num_category for done in good) == total,
            shards=tuple(done.shard for done in good),
            dropped=_counts(finished),
            builder=_settings(collection, options),
            tags=tuple(collection.tags),
            num_items=sum(done.num_items for done in finished.values()),
        )
        require()
        place.write(MANIFEST_NAME, manifest_bytes(manifest))
    clean(place, work_folder(place, options))


def _counts(finished: Mapping[int, Finished]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for done in finished.values():
        counts.update(done.dropped)
    return dict(sorted(counts.items()))


def _write_dropped(place: Place, finished: Mapping[int, Finished]) -> None:
    """One file of all that was left out, made on this machine: it may be large."""
    with tempfile.TemporaryDirectory(prefix="data_prep-") as folder:
        path = Path(folder) / DROPPED_NAME
        with open(path, "wb") as file:
            for number, done in finished.items():
                if done.dropped:
                    file.write(place.read(dropped_name(number)))
        place.put(DROPPED_NAME, path)


def _require_good(
    collection: Collection, place: Place, options: Options, finished: Mapping[int, Finished]
) -> None:
    num_bad, counts = sum(done.num_bad for done in finished.values()), _counts(finished)
    total = sum(map(len, shard_ranges(collection, options.shard_size, options.limit)))
    is_bad = num_bad > options.max_bad * total
    is_empty = not any(done.shard for done in finished.values()) and not options.part
    if not (is_bad or is_empty):
        return
    name = DROPPED_NAME
    if options.part:
        name = f"{WORK_FOLDER}/*.{DROPPED_NAME}"  # other parts may write theirs
    else:
        _write_dropped(place, finished)
    if is_bad and any(done.shard for done in finished.values()):
        raise ValueError(
            f"{num_bad} of {total} inputs of {collection.name}/{collection.split} are bad so far ({counts}), more"
            f" than the fraction max_bad={options.max_bad} allows: see {place}/{name}, mend the"
            " input and build into an empty folder, or run the same command with a higher --max-bad"
        )
    raise ValueError(
        f"{collection.name}/{collection.split}: none of {sum(done.num_items for done in finished.values())} inputs"
        f" is good ({counts}){f' so far, of {total}' if is_bad else ''}: see {place}/{name}, mend the input and"
        " build into an empty folder"
    )
