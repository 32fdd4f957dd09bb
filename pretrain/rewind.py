"""Where does a run go on from when refused steps do not end? From its last checkpoint, without what led there."""

from __future__ import annotations

from pathlib import Path

from pretrain import resume
from pretrain.checkpoint import step_of
from pretrain.collectives import from_first_rank
from pretrain.data.remote import Place
from pretrain.evidence import Journal, bundle_of
from pretrain.exits import Diverged
from pretrain.guard import StepGuard


def go_back(guard: StepGuard, journal: Journal, checkpoints: Place, out: Path) -> tuple[Place, str]:
    """The checkpoint to restore, and the line that tells it; on all ranks.

    The refused batches and some accepted ones before them are left out from there, more each time: the same weights
    on the same batches would come to the same end. Diverged, with the evidence, after guard.rewinds times.
    """
    folder = from_first_rank(lambda: resume.newest_or_none(checkpoints))
    times = from_first_rank(lambda: 0 if folder is None else journal.num_rewinds(step_of(folder)))
    step = guard.refused_in_a_row[-1].step
    if folder is None or times >= guard.limits.rewinds:
        raise Diverged(_evidence(guard, folder, times, out))
    left_out = guard.leave_out_since(guard.next_batch(step_of(folder)), times)
    from_first_rank(lambda: journal.rewound(step, step_of(folder), left_out))
    return folder, (
        f"BACK from step {step} to {folder}, after {len(guard.refused_in_a_row)} refused steps in a row: batches "
        f"{left_out} are left out from now on ({times + 1} of {guard.limits.rewinds} times)"
    )


def _evidence(guard: StepGuard, folder: Place | None, times: int, out: Path) -> str:
    refused = guard.refused_in_a_row
    told = "; ".join(f"batch {one.batch}: {', '.join(one.reasons)}" for one in refused)
    bundle = bundle_of(out, refused[0])
    return (
        f"{len(refused)} steps in a row were refused after step {refused[-1].step}, and the run has gone back "
        f"{times} times to {folder}: {told}. The samples and the losses of every rank are in {bundle.parent}; run "
        f"the first one again with `--replay {bundle}`. If the samples are sound, start with another --out and a "
        "lower optim.lr or with optim.clip, or go on from here with a larger guard.rewinds"
    )
