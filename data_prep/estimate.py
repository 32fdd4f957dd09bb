"""What would a build take? Items, shards, bytes, hours and disk, told from a few items made and thrown away."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.build import Options, work_folder
from data_prep.output import free_bytes
from data_prep.places import Place
from data_prep.plan import shard_ranges
from data_prep.samples import Collection, members
from data_prep.schema import TAR_BLOCK

MOST_ITEMS = 64  # made for the measurement
MOST_SECONDS = 10.0  # that it takes


@dataclass(frozen=True)
class Trial:
    """What became of a few items that were made on one core."""

    num_items: int
    num_bytes: int  # in a tar
    seconds: float
    dropped: Mapping[str, int]


def estimate(collection: Collection, place: Place, options: Options) -> str:
    """A few lines about a build that is not begun; nothing is written.

    The measured items lie evenly over the collection; what they say of time holds for a machine like this one, with
    a core for every worker. Where items are still to be downloaded nothing is measured, and the source's word stands.
    """
    ranges = shard_ranges(collection, options.shard_size, options.limit)
    total = sum(map(len, ranges))
    lines = [f"{place}: {total:,} items of {collection.name}/{collection.split} in {len(ranges):,} shards"]
    if collection.shard_sizes is None:
        trial = _try(collection, total)
        num_bytes = trial.num_bytes * total / max(1, trial.num_items)
        left_out = ", ".join(f"{reason} {count}" for reason, count in sorted(trial.dropped.items()))
        seconds = trial.seconds / max(1, trial.num_items) * total / options.workers
        lines += [
            f"  size  {_bytes(num_bytes)} by {trial.num_items} items made now, of which was left out: "
            f"{left_out or 'nothing'}",
            f"  time  {_time(seconds)} with {options.workers} workers at "
            f"{trial.num_items / max(trial.seconds, 1e-9):,.0f} images/s each, writing not counted",
        ]
    else:
        num_bytes = collection.num_bytes * total / max(1, len(collection.items))
        lines += [f"  size  {_bytes(num_bytes)} as the source guesses", "  time  that of the download"]
    return "\n".join([*lines, *(f"  disk  {line}" for line in _disks(place, options, num_bytes, total))])


def _try(collection: Collection, total: int) -> Trial:
    """Make at most MOST_ITEMS items within about MOST_SECONDS, and throw them away."""
    num_items, num_bytes, dropped = 0, 0, Counter()
    began = time.perf_counter()
    for index in range(0, total, -(-total // MOST_ITEMS) or 1):
        for item in collection.items[index : index + 1]:
            made = collection.make(item)
            dropped.update(drop.reason for drop in made.dropped)
            if made.sample is not None:
                num_bytes += sum(_in_tar(len(content)) for _, content in members(made.sample))
        num_items += 1
        if time.perf_counter() - began > MOST_SECONDS:
            break
    return Trial(num_items, num_bytes, time.perf_counter() - began, dropped)


def _in_tar(num_bytes: int) -> int:
    """Bytes of a file with its header and padding."""
    return TAR_BLOCK + -(-num_bytes // TAR_BLOCK) * TAR_BLOCK


def _disks(place: Place, options: Options, measured: float, total: int) -> list[str]:
    at_once = measured * min(1.0, options.workers * options.shard_size / max(1, total))
    work = f"{_bytes(at_once)} of shards in the making, {_free(work_folder(place, options))}"
    if place.local is None:
        return [work]
    return [f"{_bytes(measured)} of shards, {_free(place.local)}", work]


def _free(folder: Path) -> str:
    return f"{_bytes(free_bytes(folder))} are free in {folder}"


def _bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} TiB"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    told = [f"{count} {unit}" for count, unit in parts if count]
    return "about " + " ".join(told[:2]) if told else "less than a second"
