"""What happens between the first batch and the last checkpoint? THE loop."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.claim import ClaimLost
from pretrain import evidence
from pretrain.checkpoint import Lasting, Saver
from pretrain.collectives import from_first_rank, rank, world_size
from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.data.loader import Loader
from pretrain.engine import Engine
from pretrain.evaluate.in_training import TeacherCheck
from pretrain.evidence import Journal
from pretrain.exits import Postponed, Preempted
from pretrain.monitor import Monitor
from pretrain.monitor.window import Window
from pretrain.paths import Paths
from pretrain.place import Place
from pretrain.preemption import Signals
from pretrain.rewind import go_back
from pretrain.watchdog import FIRST, Watchdog


@dataclass(frozen=True)
class Job:
    """What the loop of one rank works with."""

    run: Run
    paths: Paths
    engine: Engine
    saver: Saver
    journal: Journal
    signals: Signals
    watchdog: Watchdog
    window: Window
    check: TeacherCheck | None = None  # what the teacher is measured with every `paths.evaluate_every` steps


def run_steps(job: Job, loader: Loader, monitor: Monitor) -> Place | None:
    """Trains until the last step, or until the guard asks for the checkpoint that is returned.

    Preempted when the ranks agree that one of them was asked to stop, ClaimLost when the place of the checkpoints was
    taken over by another process, Postponed as `_save`; Diverged as `go_back`.
    """
    run, engine, saver, watchdog = job.run, job.engine, job.saver, job.watchdog
    batches, times = iter(loader), FIRST
    while engine.steps_done < run.steps:
        job.window.before(engine.steps_done + 1)
        watchdog.at(engine.steps_done, "waits for a batch", times=times)
        with monitor.waiting_for_data():
            batch = next(batches)
        watchdog.at(engine.steps_done, "computes a step", times=times)
        losses = engine.step(batch, asks_to_stop=bool(job.signals.received) or saver.is_lost)
        times = 1.0
        if not engine.verdict.is_accepted:
            folder = _refused(job, loader, monitor, batch, losses)
            if folder is not None:
                return folder
        else:
            _accepted(job, loader, monitor, losses)
        _say_saved(job, monitor)
        if engine.is_asked_to_stop and engine.steps_done < run.steps:
            _stop(job, monitor)
    saver.finish()
    _say_saved(job, monitor)
    return None


def _accepted(job: Job, loader: Loader, monitor: Monitor, losses: Any) -> None:
    """Logs a step, and saves where it is time."""
    run, engine = job.run, job.engine
    with engine.clock.during("log"):
        trace = job.window.after(engine.steps_done)
    if trace is not None:
        monitor.say(f"traced {trace}")
    is_last = engine.steps_done == run.steps
    if job.check is not None and (engine.steps_done % job.paths.evaluate_every == 0 or is_last):
        job.watchdog.at(engine.steps_done, "evaluates the teacher", times=FIRST)
        with engine.clock.during("evaluate"):
            monitor.evaluated(engine.steps_done, job.check(engine))
    monitor.after_step(engine, losses, loader.dropped, loader.captions, loader.epochs)
    job.journal.catch_up()
    if engine.steps_done % run.save_every == 0 or is_last:
        job.watchdog.at(engine.steps_done, "saves a checkpoint")
        with monitor.saving():
            _save(job, is_last)


def _save(job: Job, is_last: bool) -> None:
    """Saves; the last checkpoint, for which there is no next one, ends the run with Postponed where it cannot be
    written now, with the error itself where it would fail again.
    """
    try:
        job.saver.save(wait=is_last)
    except (ClaimLost, Lasting):
        raise
    except OSError as error:
        raise Postponed(
            f"all {job.run.steps} steps are made, and their {error}; the same command makes those after the last "
            "checkpoint again, as a job script that goes on after 75 does"
        ) from error


def _say_saved(job: Job, monitor: Monitor) -> None:
    for line in job.saver.poll():
        monitor.say(line)


def _stop(job: Job, monitor: Monitor) -> None:
    """Saves and raises Preempted; ClaimLost where nothing can be saved any more. All ranks have agreed on it."""
    step = job.engine.steps_done
    job.watchdog.at(step, "saves a checkpoint")
    where = "from there"
    try:
        job.saver.finish()
    except ClaimLost:
        raise
    except OSError:  # of the save before, which `poll` tells
        pass
    try:
        if job.saver.saved_step != step:
            job.saver.save(wait=True)
    except ClaimLost:
        raise
    except OSError as error:  # the checkpoint before will do, and the machine is wanted
        where = f"from the last checkpoint, since this step could not be saved: {error}"
    _say_saved(job, monitor)
    raise Preempted(
        f"asked to stop by a signal, after step {step} of {job.run.steps}: the same command goes on {where}"
    )


def _refused(job: Job, loader: Loader, monitor: Monitor, batch: Batch, losses: Any) -> Place | None:
    """Keeps the evidence of a refused step; the checkpoint to go back to after too many in a row, else None."""
    engine, verdict = job.engine, job.engine.verdict
    bundle = evidence.bundle_of(job.paths.out, verdict)
    job.watchdog.at(verdict.step, "writes the evidence of a refused step")
    monitor.say(
        f"REFUSED batch {verdict.batch} after step {verdict.step}: {'; '.join(verdict.reasons)}. Nothing moved, its "
        f"samples are left out; they are told in {bundle}"
    )
    if rank() == 0:  # first of all: a start that goes on must do without the batch
        job.journal.refused(verdict, bundle)
    try:
        without = from_first_rank(lambda: _without_images(job, bundle, batch))
        if without:
            monitor.say(f"NO IMAGES of it are kept, only the samples' names: {without}")
        _keep_evidence(job, loader, bundle, batch, losses, has_images=not without)
    except OSError as error:
        warnings.warn(f"the evidence of a refused step could not be written: {error}", stacklevel=2)
    if len(engine.guard.refused_in_a_row) < job.run.guard.skips:
        return None
    job.watchdog.at(verdict.step, "goes back to a checkpoint", times=FIRST)
    with suppress(OSError):  # of the last save, which `poll` tells: the one before it is there
        job.saver.finish()
    try:
        folder, line = go_back(engine.guard, job.journal, job.paths.kept, job.paths.out)
    except OSError as error:  # on all ranks
        monitor.say(
            f"NOT GONE BACK after {len(engine.guard.refused_in_a_row)} refused steps in a row, as no checkpoint can "
            f"be read: {error}. The next batch is tried, and going back after each that is refused"
        )
        return None
    monitor.say(line)
    return folder


def _without_images(job: Job, bundle: Path, batch: Batch) -> str:
    num_bytes, most = batch.num_bytes * world_size(), job.run.guard.evidence_gib * 2**30
    return evidence.without_images(bundle, num_bytes, most, job.saver.room)


def _keep_evidence(
    job: Job, loader: Loader, bundle: Path, batch: Batch, losses: Any, *, has_images: bool
) -> None:
    """Writes this rank's part of the bundle of a refused step, the first one also what all share; OSError."""
    verdict = job.engine.verdict
    own = {name: float(nats) for name, nats in losses.nats.items()}
    samples = loader.samples(batch.position.tolist())
    evidence.write_rank(bundle, rank(), batch, samples, own, has_images=has_images)
    if rank() != 0:
        return
    places = {
        "ds_config": job.paths.ds_config,
        "tokenizer": job.paths.tokenizer,
        "guide": job.paths.guide,
        "checkpoints": job.paths.kept,
    }
    how = {"world": world_size(), "micro_batches": job.paths.micro_batches, "compile": job.paths.compile}
    left_out_before = job.engine.guard.left_out - {verdict.batch}
    evidence.write_common(bundle, verdict, left_out_before, how, places)
