"""How goes the run? OUT/log.jsonl, a console line, a progress bar with the time left, and wandb on request.

Between two logged steps nothing is read from the device; at a logged step the losses are averaged over the
ranks in one collective and the features of all targets measured, a collapse is told loudly, and a loss that is
not finite ends the run.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from pretrain.collapse import Collapse, alarm, measure, replay
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
        kept = _records(out / LOG, until=first_step)
        self._watch = replay(run, kept)
        self._log = _open_log(out / LOG, kept)
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
        self._tell(list(self._watch.collapsed.values()))  # before the checkpoint from which the run goes on

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        if self._first_rank:
            self._tell(list(self._watch.collapsed.values()))
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

    def after_step(
        self, engine: Any, losses: Any, dropped: Mapping[str, int], captions: Mapping[str, int]
    ) -> None:
        """Call after each `Engine.step` on all ranks with what it returned and the loader's counts so far.

        FloatingPointError on all ranks when a loss is not finite at a logged step.
        """
        step = engine.steps_done
        self._steps += 1
        if self._first_rank:
            self._bar.update()
        if step % self._run.log_every and step not in (1, self._run.steps):
            return
        nats = _mean_scalars(losses.nats)
        seconds = (time.perf_counter() - self._since) / self._steps
        record = {
            "step": step,
            "time": time.time(),
            "nats": nats,
            "collapse": measure(losses.seen),
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
            "captions": _sum_counts(captions),
            "skipped_steps": engine.skipped_steps,
        }
        self._waited, self._steps, self._since = 0.0, 0, time.perf_counter()
        if self._first_rank:
            self._write(record)
        check_finite(nats, step)

    def say(self, line: str) -> None:
        """One line on the console of rank 0, above the progress bar."""
        if self._first_rank and sys.stderr.isatty():
            self._bar.write(line, file=sys.stdout)
        elif self._first_rank:  # a file: redrawing the bar around every line would fill it
            print(line, flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        new = self._watch.after(record["step"], record["collapse"])
        if self._watch.collapsed:
            record["collapsed"] = sorted(self._watch.collapsed)
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
        self._tell(new)
        for name in self._watch.recovered:
            self.say(f"target {name} has recovered from its collapse")

    def _tell(self, collapses: list[Collapse]) -> None:
        """Says loudly which targets collapsed and what to do, on the console and to wandb."""
        if not collapses:
            return
        self.say(alarm(collapses))
        if self._wandb is not None:
            self._wandb.alert(title="Features collapsed", text=alarm(collapses))


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


def _mean_scalars(values: dict[str, Tensor]) -> dict[str, float]:
    """Mean over ranks of every scalar, with one collective and one wait for the device."""
    flat = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, mean_over_ranks(flat).tolist(), strict=True))


def _sum_counts(counts: Mapping[str, int]) -> dict[str, int]:
    of_ranks: list[dict[str, int]] = [dict(counts)]
    if world_size() > 1:
        of_ranks = [{} for _ in range(world_size())]
        dist.all_gather_object(of_ranks, dict(counts))
    reasons = sorted({reason for of_rank in of_ranks for reason in of_rank})
    return {reason: sum(of_rank.get(reason, 0) for of_rank in of_ranks) for reason in reasons}


def _records(path: Path, until: int) -> list[dict[str, Any]]:
    """Lines of a log up to a step, without those that a crash damaged."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [record for record in map(_record_of, lines) if record is not None and record["step"] <= until]


def _record_of(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _open_log(path: Path, kept: list[dict[str, Any]]) -> Any:
    """The log for appending, with nothing but the records that are kept."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(partial, path)
    return path.open("a")


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
