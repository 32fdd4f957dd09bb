"""What does a run folder look like when nothing was trained? Real checkpoints of freshly initialised towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from pretrain import checkpoint, intact
from pretrain.balance import BalanceTracker
from pretrain.checkpoint.ranges import Slice
from pretrain.checkpoint.read import STUDENT_PREFIX
from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.guard import StepGuard
from pretrain.towers import Towers


def write_run(
    out: Path, run: Run, facts: DataFacts, tokenizer: Path | None = None, steps: tuple[int, ...] = (0, 3)
) -> Path:
    """`out` with one checkpoint a step, each of other random weights, written by pretrain.checkpoint itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for step in steps:
            torch.manual_seed(step)
            towers = randomised(Towers(run, facts))
            place = checkpoint.checkpoints_of(out)
            checkpoint.Saver(Untrained(run, towers, step), place, facts, tokenizer).save(wait=True)
    finally:
        dist.destroy_process_group()
    return out


def resealed(step: Path) -> Path:
    """A checkpoint that was changed, as one whose writer made it so."""
    intact.mark(
        step, intact.digest(step, [name for name in intact.files_in(step) if name != intact.COMPLETE])
    )
    return step


def randomised(towers: Towers) -> Towers:
    """The same module with every zero and one of its initialisation moved, so that no weight is idle."""
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return towers


class Untrained:
    """What a Saver asks of an engine, without one."""

    stage, dtype, device, before_move = 3, torch.float32, torch.device("cpu"), None

    def __init__(self, run: Run, towers: Towers, step: int) -> None:
        self.run, self.steps_done = run, step
        self.balance = BalanceTracker(run.objective.gamma, run.balance.decay)
        self.guard = StepGuard(run.guard)
        weights: Mapping[str, torch.Tensor] = {name: p.detach() for name, p in towers.named_parameters()}
        kept = towers.state_dict().keys()
        buffers = {name: buffer for name, buffer in towers.named_buffers() if name in kept}
        flat = {name: weight.flatten() for name, weight in weights.items()}
        slices = [Slice(name, tuple(w.shape), 0, w.numel()) for name, w in weights.items()]
        self.average = SimpleNamespace(state=lambda: flat, slices=slices, buffers=buffers)
        student = {f"{STUDENT_PREFIX}{name}": values for name, values in flat.items()}
        self.owned = SimpleNamespace(
            slices=[replace(part, name=f"{STUDENT_PREFIX}{part.name}") for part in slices],
            buffers={f"{STUDENT_PREFIX}{name}": buffer for name, buffer in buffers.items()},
            steps=0,
            masters=lambda: student,
        )
