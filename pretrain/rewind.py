"""Where does a run go on from when refused steps do not end? From its last good checkpoint, without what led there.

The newest whole checkpoint is taken first. Where refused steps follow again and nothing newer was saved, it may have
been written when the run was diverging already: the next rewind takes the older one, and so on to the oldest that
there is, which is taken again and again, that of step 0 only where there is no other. A checkpoint that was passed
over is given up (pretrain/given_up.py): nobody takes it for the run's last, and the run overwrites it when it comes
there again. A rewind counts until the run has saved a checkpoint behind the step from which it went back.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import NamedTuple

from pretrain.checkpoint import folder_in, step_of, steps_in
from pretrain.checkpoint.stores import store_at
from pretrain.collectives import from_first_rank
from pretrain.evidence import Journal, Rewind, bundle_of
from pretrain.exits import Diverged
from pretrain.given_up import given_up, since
from pretrain.guard import StepGuard
from pretrain.place import Place, is_url


class Choice(NamedTuple):
    """Where a run may go back to."""

    folder: Place | None  # a whole checkpoint; None when there is none
    passed: tuple[int, ...]  # steps of newer whole ones, which led to refused steps again
    before: int  # rewinds after which the run got no further


def go_back(guard: StepGuard, journal: Journal, checkpoints: Place, out: Path) -> tuple[Place, str]:
    """The checkpoint to restore, and the line that tells it; on all ranks.

    The refused batches and some accepted ones before them are left out from there, more each time, and as many before
    each checkpoint that is passed over: the same weights on the same batches would come to the same end. Diverged,
    with the evidence, after guard.rewinds times without getting further.
    """
    folder, passed, before = from_first_rank(lambda: choose(checkpoints, journal.rewinds()))
    step = guard.refused_in_a_row[-1].step
    if folder is None or before >= guard.limits.rewinds:
        raise Diverged(_evidence(guard, folder, before, out))
    ends = [guard.next_batch(one) for one in passed]
    left_out = guard.leave_out_since(guard.next_batch(step_of(folder)), before, ends)
    now = from_first_rank(time.time)
    from_first_rank(lambda: journal.rewound(Rewind(step, step_of(folder), before, now), left_out))
    guard.rewinds.append(now)
    newer = f"; those of steps {list(passed)} led there again and are given up" if passed else ""
    return folder, (
        f"BACK from step {step} to {folder}, after {len(guard.refused_in_a_row)} refused steps in a row{newer}: "
        f"batches {left_out} are left out from now on ({before + 1} of {guard.limits.rewinds} times)"
    )


def choose(place: Place, rewinds: list[Rewind]) -> Choice:
    """The newest whole checkpoint to which the run has not gone back since it was written, else the oldest one.

    On disk every byte is read of that one alone: what is passed over is compared by sizes.
    """
    whole: list[int] = []
    steps = steps_in(place) - given_up(place, rewinds)
    for step in sorted(steps - {0}, reverse=True):
        folder = folder_in(place, step)
        is_passed = any(one.to == step for one in since(folder, rewinds))
        if _is_whole(folder, hashes=not is_passed):
            whole.append(step)
            if not is_passed:
                break
    else:
        while whole and not _is_whole(folder_in(place, whole[-1]), hashes=True):
            whole.pop()
        if not whole and 0 in steps and _is_whole(folder_in(place, 0), hashes=True):
            whole.append(0)
    if not whole:
        return Choice(None, (), 0)
    *passed, step = whole
    return Choice(folder_in(place, step), tuple(passed), _without_progress(rewinds, whole[0]))


def _is_whole(folder: Place, *, hashes: bool) -> bool:
    problem = store_at(folder).problem(hashes=hashes and not is_url(folder))
    if problem is not None:
        warnings.warn(f"{folder} is skipped, since {problem}: delete it", stacklevel=2)
    return problem is None


def _without_progress(rewinds: list[Rewind], newest: int) -> int:
    """How many of the last rewinds are not overcome by a checkpoint of step `newest`."""
    if not rewinds:
        return 0
    chain = rewinds[-rewinds[-1].before - 1 :]
    return 0 if newest > max(one.step for one in chain) else len(chain)


def _evidence(guard: StepGuard, folder: Place | None, times: int, out: Path) -> str:
    refused = guard.refused_in_a_row
    told = "; ".join(f"batch {one.batch}: {', '.join(one.reasons)}" for one in refused)
    bundle = bundle_of(out, refused[0])
    return (
        f"{len(refused)} steps in a row were refused after step {refused[-1].step}, and the run has gone back "
        f"{times} times to {folder or 'a checkpoint, of which none is left'}: {told}. The samples and the losses of "
        f"every rank are in {bundle.parent}; run the first one again with `--replay {bundle}`. If the samples are "
        "sound, start with another --out and a lower optim.lr or with optim.clip, or go on from here with a larger "
        "guard.rewinds"
    )
