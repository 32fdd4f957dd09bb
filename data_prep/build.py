"""How does a collection become a data set on disk? Shard by shard, resumable, the manifest last.

Shard i holds items [i * shard_size, (i + 1) * shard_size) of the collection, less those that were dropped; so the
bytes depend on the settings and the input alone, and neither on the number of workers nor on interruptions.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.progress import progress_bar
from data_prep.samples import Collection, json_bytes
from data_prep.schema import MANIFEST_NAME, Manifest, write_atomic, write_manifest
from data_prep.shard import TEMPORARY, WORK_FOLDER, Finished, Work, read_marker
from data_prep.tokenizer import copy_tokenizer, train_tokenizer
from data_prep.workers import in_this_process, in_workers

DROPPED_NAME = "dropped.jsonl"


@dataclass(frozen=True)
class Options:
    """How to build, whatever the source."""

    shard_size: int = 500  # items a shard
    workers: int = 2  # processes; 1 builds in this one
    max_bad: float = 0.01  # fraction of the items that may be bad before the build stops, in [0, 1]
    vocab_size: int = 8192  # at most so many words in the tokenizer

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size} must be at least 1: pass --shard-size 500")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1: pass --workers 2")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad={self.max_bad} is a fraction in [0, 1]: pass --max-bad 0.01")
        if self.vocab_size < 64:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 64: pass --vocab-size 8192")


def build(collection: Collection, folder: Path, options: Options, tokenizer_from: Path | None = None) -> bool:
    """Build one data set into `folder`, going on where an earlier run stopped; False when it was complete already.

    A tokenizer is trained from the captions, or copied from the data set `tokenizer_from`.
    Raises ValueError (other settings in the same folder, too many bad items), FileExistsError (foreign files) and
    OSError (no space left); nothing unfinished ever carries a final name.
    """
    settings = {**collection.settings, "shard_size": options.shard_size, "vocab_size": options.vocab_size}
    if (folder / MANIFEST_NAME).exists():
        _require_same(folder, settings, dict(Manifest.read(folder).builder))
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
        return False
    _claim(folder, settings)
    with _locked(folder):
        for leftover in [*folder.glob(f"*{TEMPORARY}"), *(folder / WORK_FOLDER).glob(f"*{TEMPORARY}")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        finished = _build_shards(collection, folder, options)
        _write_dropped(folder, finished)
        _require_good(collection, finished, options, folder)
        good = [done for done in finished.values() if done.shard is not None]
        total = sum(done.shard.num_samples for done in good)
        has_text = total > 0 and sum(done.num_text for done in good) == total
        with _explained(folder):
            if any(done.num_text for done in good) and tokenizer_from is not None:
                copy_tokenizer(tokenizer_from, folder)
            elif any(done.num_text for done in good):
                train_tokenizer(folder, [done.shard.name for done in good], options.vocab_size)
            manifest = Manifest(
                name=collection.name,
                split=collection.split,
                categories=tuple(collection.categories),
                num_samples=total,
                has_text=has_text,
                has_category=bool(collection.categories) and sum(done.num_category for done in good) == total,
                shards=tuple(done.shard for done in good),
                dropped=dict(sorted(Counter(drop.reason for drop in _drops(finished)).items())),
                builder=settings,
                tags=tuple(collection.tags),
            )
            write_manifest(folder, manifest)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    return True


def _build_shards(collection: Collection, folder: Path, options: Options) -> dict[int, Finished]:
    """Every shard of the collection by its number; those an earlier run finished are taken as they are."""
    size = options.shard_size
    starts = range(0, len(collection.items), size)
    found = {number: read_marker(folder, number) for number in range(len(starts))}
    finished = {number: done for number, done in found.items() if done is not None}
    todo = [
        Work(str(folder), number, collection.items[number * size : (number + 1) * size], collection.make)
        for number in range(len(starts))
        if number not in finished
    ]
    num_todo = sum(len(work.items) for work in todo)
    _require_space(collection, folder, num_todo)
    num_done = len(collection.items) - num_todo
    what = f"{collection.name}/{collection.split}"
    limit = options.max_bad * len(collection.items)
    run = in_this_process if options.workers == 1 or len(todo) < 2 else in_workers
    with progress_bar(len(collection.items), what, done=num_done) as bar, _explained(folder):
        for number, done in run(todo, min(options.workers, max(1, len(todo))), bar.update):
            finished[number] = done
            if sum(one.num_bad for one in finished.values()) > limit:
                break  # no good end is possible any more; the caller says so
        else:
            assert len(finished) == len(starts), "a shard got lost"
    return dict(sorted(finished.items()))


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder ours, or say why it cannot be."""
    recorded = folder / WORK_FOLDER / "settings.json"
    if recorded.is_file():
        _require_same(folder, settings, json.loads(recorded.read_text(encoding="utf-8")))
        return
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, a build needs an empty folder: choose another --out")
    foreign = (
        sorted(entry.name for entry in folder.iterdir() if entry.name != WORK_FOLDER)
        if folder.exists()
        else []
    )
    if foreign:
        raise FileExistsError(
            f"{folder} holds {foreign[:3]}{' and more' if len(foreign) > 3 else ''}, a build needs an empty folder:"
            " choose another --out, or empty it"
        )
    with _explained(folder):
        (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
        write_atomic(recorded, json_bytes(settings))


def _require_same(folder: Path, wanted: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    wanted = json.loads(json_bytes(wanted))
    differing = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if differing:
        pairs = ", ".join(
            f"{name}: {there.get(name)!r} there, {wanted.get(name)!r} asked" for name in differing
        )
        raise ValueError(
            f"{folder} was begun with other settings or another input ({pairs}); a folder holds one data set:"
            " choose another --out, or remove that folder"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build a folder at a time; the lock dies with its process."""
    with open(folder / WORK_FOLDER / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"{folder} is being built by another process: wait until it ends"
            ) from error
        yield


def _require_space(collection: Collection, folder: Path, num_todo: int) -> None:
    needed = int(collection.num_bytes * num_todo / max(1, len(collection.items)))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 2**20:,.0f} MiB free, {num_todo} items need about {needed / 2**20:,.0f} MiB:"
            " free some space or choose another --out",
        )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn a full disk into a sentence; finished shards stay and are used by the next run."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no space left in {folder}: free some space and run the same command again, it goes on after the last"
            " finished shard",
        ) from error


def _drops(finished: Mapping[int, Finished]) -> Iterator[Any]:
    for done in finished.values():
        yield from done.dropped


def _write_dropped(folder: Path, finished: Mapping[int, Finished]) -> None:
    lines = [json.dumps(asdict(drop), ensure_ascii=True, sort_keys=True) + "\n" for drop in _drops(finished)]
    with _explained(folder):
        write_atomic(folder / WORK_FOLDER / DROPPED_NAME, "".join(lines).encode())
        os.replace(folder / WORK_FOLDER / DROPPED_NAME, folder / DROPPED_NAME)


def _require_good(
    collection: Collection, finished: Mapping[int, Finished], options: Options, folder: Path
) -> None:
    num_bad = sum(done.num_bad for done in finished.values())
    counts = dict(sorted(Counter(drop.reason for drop in _drops(finished)).items()))
    total = len(collection.items)
    if num_bad > options.max_bad * total:
        raise ValueError(
            f"{num_bad} of {total} inputs of {collection.name}/{collection.split} are bad so far ({counts}), more"
            f" than the fraction max_bad={options.max_bad} allows: see {folder / DROPPED_NAME}, mend the"
            " input and build into an empty folder, or run the same command with a higher --max-bad"
        )
    if not any(done.shard for done in finished.values()):
        raise ValueError(
            f"{collection.name}/{collection.split}: none of {total} inputs is good ({counts}): see"
            f" {folder / DROPPED_NAME}, mend the input and build into an empty folder"
        )
