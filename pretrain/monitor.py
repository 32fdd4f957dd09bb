"""How goes the run? OUT/log.jsonl, a console line, a progress bar with the time left, and wandb on request.

Between two logged steps nothing is read from the device; at a logged step the losses are averaged over the
ranks in one collective, and a loss that is not finite ends the run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from pretrain.collectives import mean_over_ranks, rank, world_size
from pretrain.config import Run
from pretrain.intact import write_text

LOG = "log.jsonl"
WANDB_PROJECT = "m3i"
SECONDS_BETWEEN_BARS = {True: 0.2, False: 20.0}  # is stderr a terminal? A file gets few lines


class Monitor:
    """Follows the steps of one process; only rank 0 writes. Use as `with Monitor(...) as monitor`."""

    def __init__(self, out: Path, run: Run, first_step: int, *, wandb: bool = False) -> None:
        self._run = run
        self._first_rank = rank() == 0
        self._waited, self._steps, self._since = 0.0, 0, time.perf_counter()
        self._wandb: Any = None
        if not self._first_rank:
            return
        self._log = _open_log(out / LOG, first_step)
        self._bar = tqdm(
            total=run.steps,
            initial=first_step,
            desc="pre-training",
            unit="step",
            mininterval=SECONDS_BETWEEN_BARS[sys.stderr.isatty()],
            dynamic_ncols=True,
        )
        if wandb:
            self._wandb = _start_wandb(out, run, first_step)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        if self._first_rank:
            self._bar.close()
            self._log.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting for the loader."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leaves the time inside out of the step's: writing a checkpoint is not training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def after_step(self, engine: Any, losses: Any, dropped: dict[str, int]) -> None:
        """Call after each `Engine.step` on all ranks with what it returned and the loader's drop counts.

        FloatingPointError on all ranks when a loss is not finite at a logged step.
        """
        step = engine.steps_done
        self._steps += 1
        if self._first_rank:
            self._bar.update()
        if step % self._run.log_every and step not in (1, self._run.steps):
            return
        means = _mean_scalars({"nats": losses.nats, "diagnostics": losses.diagnostics})
        seconds = (time.perf_counter() - self._since) / self._steps
        record = {
            "step": step,
            "time": time.time(),
            **means,
            "grad_norm": float(engine.grad_norm),
            "grad_norm_image": float(engine.balance.image_norm),
            "grad_norm_label": float(engine.balance.label_norm),
            "lambda": float(engine.balance.weight),
            "lr": engine.lr,
            "momentum": engine.momentum,
            "images_per_second": self._run.batch / seconds,
            "memory_bytes": peak_memory(),
            "data_wait_seconds": self._waited / self._steps,
            "step_seconds": seconds,
            "dropped": _sum_counts(dropped),
            "skipped_steps": engine.skipped_steps,
        }
        self._waited, self._steps, self._since = 0.0, 0, time.perf_counter()
        if self._first_rank:
            self._write(record)
        check_finite(means["nats"], step)

    def say(self, line: str) -> None:
        """One line on the console of rank 0, above the progress bar."""
        if self._first_rank and sys.stderr.isatty():
            self._bar.write(line, file=sys.stdout)
        elif self._first_rank:  # a file: redrawing the bar around every line would fill it
            print(line, flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()
        nats = "  ".join(f"{name} {value:.4f}" for name, value in record["nats"].items())
        self.say(
            f"step {record['step']}/{self._run.steps}  {nats}  |g| {record['grad_norm']:.3g}  "
            f"lambda {record['lambda']:.3g}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} img/s  "
            f"wait {100 * record['data_wait_seconds'] / record['step_seconds']:.0f} %"
        )
        if self._wandb is not None:
            self._wandb.log(record, step=record["step"])


def check_finite(nats: dict[str, float], step: int) -> None:
    """FloatingPointError that names the losses that are not finite."""
    broken = {name: value for name, value in nats.items() if not math.isfinite(value)}
    if broken:
        raise FloatingPointError(
            f"loss {broken} after step {step} must be finite; start again from the last checkpoint with a lower "
            "optim.lr, with optim.clip, or with another --out from the beginning"
        )


def peak_memory() -> int:
    """Bytes: highest allocation on this rank's GPU so far, or of the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mean_scalars(groups: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Mean over ranks of every scalar, with one collective and one wait for the device."""
    flat = [value.detach().float() for group in groups.values() for value in group.values()]
    means = iter(mean_over_ranks(torch.stack(flat)).tolist())
    return {title: {name: next(means) for name in group} for title, group in groups.items()}


def _sum_counts(counts: dict[str, int]) -> dict[str, int]:
    of_ranks: list[dict[str, int]] = [counts]
    if world_size() > 1:
        of_ranks = [{} for _ in range(world_size())]
        dist.all_gather_object(of_ranks, dict(counts))
    reasons = sorted({reason for of_rank in of_ranks for reason in of_rank})
    return {reason: sum(of_rank.get(reason, 0) for of_rank in of_ranks) for reason in reasons}


def _open_log(path: Path, first_step: int) -> Any:
    """The log for appending, without the lines after `first_step` and without those that a crash damaged."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept = [f"{line}\n" for line in lines if _step_of(line) <= first_step]
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text("".join(kept))
    os.replace(partial, path)
    return path.open("a")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def wandb_id(out: Path, first_step: int) -> str:
    """By which wandb knows a run: drawn when it begins, the same for every start that goes on from a checkpoint."""
    path = out / "wandb_id"
    if first_step == 0 or not path.exists():
        write_text(path, secrets.token_hex(8))
    return path.read_text()


def _start_wandb(out: Path, run: Run, first_step: int) -> Any:
    """A wandb run that a resume continues; WANDB_MODE=offline keeps it on this machine."""
    import wandb

    return wandb.init(
        project=WANDB_PROJECT,
        name=out.name,
        id=wandb_id(out, first_step),
        dir=str(out),
        resume="allow",
        config=dataclasses.asdict(run),
    )
