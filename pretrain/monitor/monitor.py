"""What is measured of every step, and told of some?

Between two logged steps nothing is read from the device; at a logged step the losses are averaged over the
ranks and the features of all targets measured, and a collapse is told loudly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from pretrain.clock import Clock
from pretrain.collapse import Collapse, alarm, measure, replay, too_short
from pretrain.collectives import rank, world_size
from pretrain.config import Run
from pretrain.monitor.console import Unbroken, block, line
from pretrain.monitor.log import LOG, line_of, open_log, records
from pretrain.monitor.ranks import Sources, hosts, mean_scalars, nats_by_source, resources, sum_counts
from pretrain.monitor.speed import Speed
from pretrain.monitor.spent import Spent
from pretrain.monitor.trackers import Tracker

SECONDS_BETWEEN_BARS = {True: 0.2, False: 20.0}  # is stderr a terminal? A file gets few lines
LINES_A_BLOCK = 20  # lines of the console after which one is told in full


class Monitor:
    """Follows the steps of one process; only rank 0 writes. Use as `with Monitor(...) as monitor`.

    `clock` is that of the engine; `trackers` (of rank 0) are told what the log is; `spent` counts on where a run has
    gone back. A collective call.
    """

    def __init__(
        self,
        out: Path,
        run: Run,
        first_step: int,
        clock: Clock,
        *,
        sources: Sources | None = None,
        speed: Speed | None = None,
        spent: Spent | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._run, self._clock, self._sources, self._speed = run, clock, sources, speed
        self._first_rank = rank() == 0
        self._hosts = hosts()
        self._steps = self._lines = 0
        self._spent = spent or Spent(world_size())
        self._trackers = trackers
        self._evaluation: dict[str, Any] | None = None  # that the next line of the log tells
        clock.look()  # what came before is none of a step's
        if not self._first_rank:
            return
        kept = records(out / LOG, until=first_step)
        self._watch = replay(run, kept)
        self._bar = tqdm(
            total=run.steps,
            initial=first_step,
            desc="pre-training",
            unit="step",
            file=Unbroken(sys.stderr),
            mininterval=SECONDS_BETWEEN_BARS[sys.stderr.isatty()],
            dynamic_ncols=True,
        )
        for tracker in trackers:
            tracker.begin(first_step)
        self._spent.keep(out, self.say)
        self._log = open_log(out / LOG, kept, self.say)
        self._tell(list(self._watch.collapsed.values()))  # before the checkpoint from which the run goes on
        if untold := too_short(run):
            self.say(f"collapse of features: {untold}")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        if self._first_rank:
            self._tell(list(self._watch.collapsed.values()))
            self._log.close()
            self._bar.close()

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """Counts the time inside as waiting for the loader."""
        return self._clock.during("data_wait")

    def saving(self) -> AbstractContextManager[None]:
        """Counts the time inside as writing a checkpoint."""
        return self._clock.during("save")

    def after_step(
        self,
        engine: Any,
        losses: Any,
        dropped: Mapping[str, int],
        captions: Mapping[str, int],
        epochs: Mapping[str, float],
    ) -> None:
        """Call after each accepted `Engine.step` on all ranks with what it gave and the loader's counts so far."""
        self._steps += 1
        if self._first_rank:
            self._bar.update()
        if not self._run.is_logged(engine.steps_done):
            return
        seconds = {part: total / self._steps for part, total in self._clock.look().items()}
        with self._clock.during("log"):
            record = self._record(engine, losses, seconds)
            record |= {
                "dropped": sum_counts(dropped),
                "captions": sum_counts(captions),
                "epochs": dict(epochs),
            }
            self._steps = 0
            if self._first_rank:
                self._write(record)

    def evaluated(self, step: int, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """What the teacher is worth after a step, by protocol; told at once, and in the next line of the log.

        Loudly, and to the trackers, where the data have not been what they were.
        """
        self._evaluation = {"step": step, **rows}
        told = ", ".join(
            f"{name} {row['accuracy']:.1%} (chance {row['chance']:.1%})"
            for name, row in rows.items()
            if row["accuracy"] is not None
        )
        if told:
            self.say(f"teacher of step {step}: {told}")
        for problem in _problems_of(rows):
            text = f"{problem}. The training goes on"
            self.say(f"TEACHER OF STEP {step} {text}")
            for tracker in self._trackers:
                tracker.alert("The teacher was not measured as asked", f"Teacher of step {step} {text}")

    def say(self, line: str) -> None:
        """One line on the console of rank 0, above the progress bar."""
        if self._first_rank and sys.stderr.isatty():
            self._bar.write(line, file=Unbroken(sys.stdout))
        elif self._first_rank:  # a file: redrawing the bar around every line would fill it
            print(line, file=Unbroken(sys.stdout), flush=True)

    def _record(self, engine: Any, losses: Any, seconds: dict[str, float]) -> dict[str, Any]:
        """What all ranks know of the step; those of `seconds` are this rank's."""
        nats = mean_scalars(losses.nats)
        device = next(iter(losses.nats.values())).device
        used = resources(seconds, device, self._hosts)
        taken = sum(used["seconds"].values())
        record = {
            "step": engine.steps_done,
            "time": time.time(),
            "nats": nats,
            "collapse": measure(losses.seen),
            "grad_norm": float(engine.grad_norm),
            "grad_norm_by_part": _floats(engine.part_norms),
            "grad_norm_image": float(engine.balance.image_norm),
            "grad_norm_label": float(engine.balance.label_norm),
            "grad_norm_by_target": _floats(engine.balance.reader_norms),
            "lambda": float(engine.balance.weight),
            "lr": engine.lr,
            "momentum": engine.momentum,
            "images_per_second": self._run.batch / taken,
            "step_seconds": taken,
            **used,
            **self._spent.after(taken, self._run.steps - engine.steps_done),
            "skipped_steps": engine.skipped_steps,
        }
        if self._run.objective.input.mixed == 2:
            record["pairs_per_second"] = record["images_per_second"] / 2
        if self._speed is not None:
            record |= self._speed.figures(taken)
        if self._sources is not None and len(self._sources.names) > 1:
            record["nats_by_source"] = nats_by_source(losses.each, self._sources)
        return record

    def _write(self, record: dict[str, Any]) -> None:
        if self._evaluation is not None:
            record["evaluation"], self._evaluation = self._evaluation, None
        new = self._watch.after(record["step"], record["collapse"])
        if self._watch.collapsed:
            record["collapsed"] = sorted(self._watch.collapsed)
        self._log.add(line_of(record))
        self.say(line(record, self._run))
        is_last = record["step"] == self._run.steps
        if (
            self._lines % LINES_A_BLOCK == 1 or is_last or "slowest" in record
        ):  # the first line still warms up
            self.say(block(record))
        self._lines += 1
        for tracker in self._trackers:
            tracker.log(record)
        self._tell(new)
        for name in self._watch.recovered:
            self.say(f"target {name} has recovered from its collapse")

    def _tell(self, collapses: list[Collapse]) -> None:
        """Says loudly which targets collapsed and what to do, on the console and to the trackers."""
        if not collapses:
            return
        self.say(alarm(collapses))
        for tracker in self._trackers:
            tracker.alert("Features collapsed", alarm(collapses))


def _problems_of(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What could not be read of the data by which a teacher is measured, each problem once."""
    reasons = [row["reason"] for row in rows.values() if row["accuracy"] is None]
    if reasons:
        return [f"NOT MEASURED: {reason}" for reason in dict.fromkeys(reasons)]
    dropped = next((row["dropped"] for row in rows.values()), {})
    return [
        f"MEASURED WITHOUT {sum(counts.values())} {split} images that cannot be read ({counts})"
        for split, counts in dropped.items()
        if counts
    ]


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
