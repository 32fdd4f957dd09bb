"""What does a run folder look like when nothing was trained? Real checkpoints of freshly initialised towers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from pretrain import checkpoint
from pretrain.balance import BalanceTracker
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
            checkpoint.save(_Untrained(run, towers, step), out, facts, tokenizer)
    finally:
        dist.destroy_process_group()
    return out


def randomised(towers: Towers) -> Towers:
    """The same module with every zero and one of its initialisation moved, so that no weight is idle."""
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return towers


class _Untrained:
    """What checkpoint.save asks of an engine, without one."""

    stage, dtype, device, checkpoint_bytes = 3, torch.float32, torch.device("cpu"), 0

    def __init__(self, run: Run, towers: Towers, step: int) -> None:
        self.run, self.steps_done = run, step
        self.balance = BalanceTracker(run.objective.gamma, run.balance.decay)
        self.guard = StepGuard(run.guard)
        weights: Mapping[str, torch.Tensor] = {name: p.detach() for name, p in towers.named_parameters()}
        kept = towers.state_dict().keys()
        self.average = SimpleNamespace(
            state=lambda: {name: weight.flatten() for name, weight in weights.items()},
            slices=[
                SimpleNamespace(name=name, shape=tuple(weight.shape), start=0, numel=weight.numel())
                for name, weight in weights.items()
            ],
            buffers={name: buffer for name, buffer in towers.named_buffers() if name in kept},
        )

    def save_native(self, folder: Path) -> None:
        (folder / "none").write_text("this checkpoint cannot be trained on\n")

    def load_native(self, folder: Path) -> None:
        raise NotImplementedError
