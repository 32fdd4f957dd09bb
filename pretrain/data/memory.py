"""Do the batches of a run fit into the memory of this machine?"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from pretrain.config import Run
from pretrain.data.room import MOST_KEPT
from pretrain.free_memory import control_groups, whole
from pretrain.preflight.ranks import LOCAL_SIZES, ranks_of

GIB = 2**30
WORKER_BYTES = 1.5 * GIB  # that a worker may take without a word
BESIDE_BATCHES = 1.2 * GIB  # bytes of that: its program, and an image of the most pixels that decoders take
MEMINFO = Path("/proc/meminfo")


def require_memory(
    run: Run, world: int, workers: int, *, meminfo: Path = MEMINFO, groups: Sequence[Path] | None = None
) -> None:
    """ValueError for batches that all memory of this machine, or of its container, does not hold; warns of those
    that may take a worker beyond what is promised of it.

    What workers take beside batches is no part of the error: most never meet an image of the most pixels. With
    views.on_device=all a batch has room for its views too, and beside it files, whose size no recipe tells.
    """
    held = run.images_per_rank(world) * 6 * run.views.size**2
    is_told = any(name in os.environ for name in LOCAL_SIZES)  # else all ranks may be here, or this one alone
    ranks = ranks_of().local_size if is_told else 1
    needed = ranks * max(MOST_KEPT * workers, 1) * held
    there = whole(meminfo.read_text(), control_groups() if groups is None else groups)
    if needed > there:
        raise ValueError(
            f"batch={run.batch} of views.size={run.views.size} is {held / GIB:.2f} GiB of views on a rank, and "
            f"with --workers {workers} the batches of {ranks} ranks here are {needed / GIB:.2f} GiB, more than "
            f"the {there / GIB:.2f} of this machine's memory: lower batch, views.size or --workers, or share the "
            "batch among more machines"
        )
    taken = BESIDE_BATCHES + MOST_KEPT * held
    if workers and taken > WORKER_BYTES:
        warnings.warn(
            f"each of {workers} workers may take {taken / GIB:.2f} GiB, with room for {MOST_KEPT} batches of "
            f"{held / GIB:.2f} and for the largest image: where that is too much, share the batch among more "
            "ranks, or lower --workers",
            stacklevel=3,
        )
