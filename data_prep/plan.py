"""Which items go into which shard, and which shards does one of several builders make?

Shard i holds a run of the collection's items: `shard_size` of them, or as many as the input fixes. Of N builders the
i-th makes every N-th shard, so that each has a share of early and late ones.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.samples import Collection

SLURM = "slurm"  # as --part: what Slurm says to the task of an array


@dataclass(frozen=True)
class Part:
    """Builder `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def owns(self, shard: int) -> bool:
        """Whether this builder makes the shard of that number."""
        return shard % self.count == self.index


WHOLE = Part()


def part_of(text: str) -> Part:
    """The part that `3/16` names, or `slurm` by the environment of an array's task; "" is everything.

    Raises ValueError for anything else.
    """
    if not text:
        return WHOLE
    if text == SLURM:
        text = _slurm_part()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(
            f"part={text!r} must be I/N with 1 <= I <= N, such as --part 3/16, or --part {SLURM}"
        )
    return Part(int(match[1]) - 1, int(match[2]))


def _slurm_part() -> str:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_STEP")
    task, first, count, step = (os.environ.get(name, "") for name in names)
    if not (task.isdigit() and first.isdigit() and count.isdigit()):
        raise ValueError(
            f"part={SLURM!r} needs {', '.join(names[:3])}, which only the tasks of an array have: submit with "
            "sbatch --array=1-16, or pass --part 3/16"
        )
    return f"{(int(task) - int(first)) // int(step or 1) + 1}/{count}"


def shard_ranges(collection: Collection, shard_size: int, limit: int = 0) -> list[range]:
    """Indices of the items of each shard, in order; at most `limit` items in all (0 = all).

    Raises ValueError when the collection fixes sizes that are not those of its items.
    """
    total = len(collection.items)
    end = min(limit, total) if limit else total
    if collection.shard_sizes is None:
        return [range(start, min(start + shard_size, end)) for start in range(0, end, shard_size)]
    if sum(collection.shard_sizes) != total or min(collection.shard_sizes, default=0) < 0:
        raise ValueError(
            f"shard_sizes of {collection.name} sum up to {sum(collection.shard_sizes)}, its items are {total}: mend "
            "the source"
        )
    ranges, start = [], 0
    for size in collection.shard_sizes:
        if start >= end and start:
            break
        ranges.append(range(start, min(start + size, end)))
        start += size
    return ranges


def settings_of(collection: Collection, shard_size: int, vocab_size: int, limit: int) -> dict[str, Any]:
    """Everything that decides the bytes of a data set, as its manifest records it."""
    settings: Mapping[str, Any] = {**collection.settings, "shard_size": shard_size, "vocab_size": vocab_size}
    if collection.shard_sizes is not None:
        sizes = hashlib.sha256(repr([int(size) for size in collection.shard_sizes]).encode()).hexdigest()
        settings = {**settings, "shard_size": "fixed by the input", "shard_sizes_sha256": sizes}
    return {**settings, "limit": limit} if limit else dict(settings)
