"""What happens between the first batch and the last checkpoint? THE loop."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain import checkpoint, evidence, resume
from pretrain.checkpoint import step_of
from pretrain.collectives import from_first_rank, rank, world_size
from pretrain.config import Run
from pretrain.data import drops
from pretrain.data.batch import Batch
from pretrain.data.loader import Loader
from pretrain.data.remote import Place
from pretrain.data.sources import tokenizer_beside
from pretrain.distributed import start_distributed
from pretrain.ds_config import describe, read_ds_config, resolve_config
from pretrain.engine import Engine
from pretrain.evidence import Journal
from pretrain.exits import Preempted, RankLost
from pretrain.facts import DataFacts
from pretrain.intact import write_text
from pretrain.lock import only_writer
from pretrain.models.guides import Guide, open_guide
from pretrain.monitor import Monitor
from pretrain.preemption import Signals
from pretrain.pretrainer import Pretrainer
from pretrain.rewind import go_back
from pretrain.towers import Towers, targets_without_labels
from pretrain.watchdog import FIRST, REMEDY, TIMEOUT, Watchdog


@dataclass(frozen=True)
class Paths:
    """What of a start belongs to the machine and not to the recipe."""

    data: dict[str, Place]  # name of a source in the recipe -> its data set
    out: Path
    ds_config: Path
    tokenizer: Path | None = None  # folder; that of the first captioned data set if None
    guide: Path | None = None  # folder of the frozen encoder that targets need
    workers: int = 0  # processes that decode for each rank; 0 = the training process itself
    wandb: bool = False
    timeout: float = TIMEOUT  # seconds without progress before a run ends that has lost a rank


class Saver:
    """Checkpoints of a run; one that cannot be written is told, and the run goes on with the one before."""

    def __init__(self, engine: Engine, out: Path, facts: DataFacts, tokenizer: Path | None) -> None:
        self._arguments = (engine, out, facts, tokenizer)
        self._lines: list[str] = []

    def save(self, *, wait: bool = False) -> None:
        """Writes the present state, on all ranks; OSError when it cannot and must, by `wait`."""
        try:
            self._lines.append(f"saved {checkpoint.save(*self._arguments)}")
        except OSError as error:
            if wait:
                raise
            self._lines.append(f"NOT SAVED, the run goes on: {error}")

    def poll(self) -> list[str]:
        """What has been saved or has failed since it was last asked."""
        lines, self._lines = self._lines, []
        return lines

    def finish(self) -> None:
        """Waits for what is being written."""


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


def train(run: Run, paths: Paths) -> None:
    """Pre-trains from the newest whole checkpoint in `paths.out`, or from the beginning; on all ranks.

    Preempted, Diverged and RankLost tell how else than finished or failed it ended.
    """
    ds_config = read_ds_config(paths.ds_config)
    device = start_distributed(paths.timeout * FIRST * 2)  # the watchdog, which names the rank, comes first
    config, machine = resolve_config(ds_config, run, device)
    with ExitStack() as held:
        from_first_rank(lambda: held.enter_context(only_writer(paths.out)) and None)
        signals = held.enter_context(Signals())
        watchdog = held.enter_context(Watchdog(paths.out, rank(), world_size(), paths.timeout))
        try:
            _train(run, paths, config, machine, device, signals, watchdog)
        except RuntimeError as error:
            if not is_of_another_rank(error):
                raise
            told, is_teller = watchdog.lost()
            raise RankLost(f"{told}. {REMEDY}" if told and is_teller else "") from error
    dist.destroy_process_group()  # NCCL complains of what is left to the end of the process


def _train(
    run: Run,
    paths: Paths,
    config: dict[str, Any],
    machine: str,
    device: torch.device,
    signals: Signals,
    watchdog: Watchdog,
) -> None:
    folder = from_first_rank(lambda: resume.newest_or_none(paths.out))
    journal = Journal(paths.out)
    skipped = from_first_rank(lambda: resume.batches_left_out(folder, journal))
    tokenizer = tokenizer_folder(run, paths)
    guide = read_guide(run, paths.guide)
    dropped = drops.file_of(paths.out, rank(), world_size())
    with ExitStack() as held:
        first_step = 0 if folder is None else step_of(folder)
        loader = open_loader(run, paths, tokenizer, device, first_step, skipped, dropped)
        held.enter_context(closing(loader))
        facts = with_guide(loader.facts, guide)
        if folder is not None:  # refuses another recipe before minutes of building
            resume.check_resumable(folder, run, facts, **describe(config))
        engine = build_engine(run, facts, config, device, guide)
        engine.guard.left_out |= skipped
        if rank() == 0:
            _write_inputs(run, paths)
        saver = Saver(engine, paths.out, facts, tokenizer)
        job = Job(run, paths, engine, saver, journal, signals, watchdog)
        while True:
            if folder is not None:
                watchdog.at(step_of(folder), "reads a checkpoint", times=FIRST)
                checkpoint.restore(engine, folder)
            with Monitor(paths.out, run, engine.steps_done, wandb=paths.wandb) as monitor:
                monitor.say(f"{machine}; {'from the beginning' if folder is None else f'from {folder}'}")
                if line := left_out(run, facts):
                    monitor.say(line)
                if folder is None:
                    saver.save()
                folder = _run_steps(job, loader, monitor)
            if folder is None:
                return
            held.close()
            first_step, skipped = step_of(folder), engine.guard.left_out
            loader = open_loader(run, paths, tokenizer, device, first_step, skipped, dropped)
            held.enter_context(closing(loader))


def _run_steps(job: Job, loader: Loader, monitor: Monitor) -> Path | None:
    """Trains until the last step, or until the guard asks for the checkpoint that is returned."""
    run, engine, saver, watchdog = job.run, job.engine, job.saver, job.watchdog
    batches, times = iter(loader), FIRST
    while engine.steps_done < run.steps:
        watchdog.at(engine.steps_done, "waits for a batch", times=times)
        with monitor.waiting_for_data():
            batch = next(batches)
        watchdog.at(engine.steps_done, "computes a step", times=times)
        losses = engine.step(batch, asks_to_stop=bool(job.signals.received))
        times = 1.0
        if not engine.verdict.is_accepted:
            folder = _refused(job, loader, monitor, batch, losses)
            if folder is not None:
                return folder
        else:
            monitor.after_step(engine, losses, loader.dropped, loader.captions)
            is_last = engine.steps_done == run.steps
            if engine.steps_done % run.save_every == 0 or is_last:
                watchdog.at(engine.steps_done, "saves a checkpoint")
                with monitor.uncounted():
                    saver.save(wait=is_last)
        for line in saver.poll():
            monitor.say(line)
        if engine.is_asked_to_stop and engine.steps_done < run.steps:
            _stop(job, monitor)
    saver.finish()
    for line in saver.poll():
        monitor.say(line)
    return None


def _stop(job: Job, monitor: Monitor) -> None:
    """Saves and raises Preempted; all ranks have agreed on it."""
    step = job.engine.steps_done
    job.watchdog.at(step, "saves a checkpoint")
    where = "from there"
    try:
        job.saver.save(wait=True)
    except OSError as error:  # the checkpoint before will do, and the machine is wanted
        where = f"from the last checkpoint, since this step could not be saved: {error}"
    for line in job.saver.poll():
        monitor.say(line)
    raise Preempted(
        f"asked to stop by a signal, after step {step} of {job.run.steps}: the same command goes on {where}"
    )


def _refused(job: Job, loader: Loader, monitor: Monitor, batch: Batch, losses: Any) -> Path | None:
    """Keeps the evidence of a refused step; the checkpoint to go back to after too many in a row, else None."""
    engine, verdict = job.engine, job.engine.verdict
    bundle = evidence.bundle_of(job.paths.out, verdict)
    job.watchdog.at(verdict.step, "writes the evidence of a refused step")
    monitor.say(
        f"REFUSED batch {verdict.batch} after step {verdict.step}: {'; '.join(verdict.reasons)}. Nothing moved, its "
        f"samples are left out; they are told in {bundle}"
    )
    try:
        own = {name: float(nats) for name, nats in losses.nats.items()}
        samples = loader.samples(batch.position.tolist())
        evidence.write_rank(bundle, rank(), batch, samples, own)
        if rank() == 0:
            places = {
                "ds_config": job.paths.ds_config,
                "tokenizer": job.paths.tokenizer,
                "guide": job.paths.guide,
            }
            evidence.write_common(
                bundle, verdict, engine.guard.left_out - {verdict.batch}, world_size(), places
            )
            job.journal.refused(verdict, bundle)
    except OSError as error:
        warnings.warn(f"the evidence of a refused step could not be written: {error}", stacklevel=2)
    if len(engine.guard.refused_in_a_row) < job.run.guard.skips:
        return None
    with suppress(OSError):  # it has been told, and the checkpoint before is there
        job.saver.finish()
    folder, line = go_back(engine.guard, job.journal, job.paths.out)
    monitor.say(line)
    return folder


def is_of_another_rank(error: RuntimeError) -> bool:
    """Did a collective call fail since a rank, or the way to it, is gone?"""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))


def build_engine(
    run: Run, facts: DataFacts, config: dict[str, Any], device: torch.device, guide: Guide | None
) -> Engine:
    """The run before its first step, equal on all ranks."""
    torch.manual_seed(run.seed)
    with torch.device(device):
        model, teacher = Pretrainer(run, facts), Towers(run, facts)
    return Engine(model, teacher, run, config, guide)


def open_loader(
    run: Run,
    paths: Paths,
    tokenizer: Path | None,
    device: torch.device,
    first_step: int,
    skipped: set[int],
    dropped_to: Path | None,
) -> Loader:
    """This rank's batches after `first_step` others, without those that are left out."""
    return Loader(
        run,
        paths.data,
        tokenizer,
        rank=rank(),
        world=world_size(),
        workers=paths.workers,
        start_step=first_step,
        left_out=skipped,
        dropped_to=dropped_to,
        device=device,
    )


def _write_inputs(run: Run, paths: Paths) -> None:
    """What this start was given, for those who read the run's folder."""
    write_text(paths.out / "recipe.json", run.to_json())
    places = {name: str(p.resolve()) if isinstance(p, Path) else p for name, p in paths.data.items()}
    write_text(paths.out / "data.json", json.dumps(places, indent=1))


def tokenizer_folder(run: Run, paths: Paths) -> Path | None:
    """The named one, else that beside the shards of the first captioned source; None without captions."""
    captioned = [name for name, source in run.data.items() if source.supervision == "text"]
    if paths.tokenizer is None and captioned and captioned[0] in paths.data:
        return tokenizer_beside(paths.data[captioned[0]])
    return paths.tokenizer if captioned else None


def left_out(run: Run, facts: DataFacts) -> str | None:
    """The line that names the targets which nothing in the data serves, and why; None where all are served."""
    without = targets_without_labels(run, facts)
    if not without:
        return None
    told = ", ".join(f"{name} (no source has supervision={t.kind!r})" for name, t in without.items())
    sources = {name: source.supervision for name, source in run.data.items()}
    return f"LEFT OUT of the objective of {run.name}: {told}; the others are trained. Sources: {sources}"


def read_guide(run: Run, folder: Path | None) -> Guide | None:
    """The frozen encoder that targets need; None without one; ValueError when it is no encoder, or lacks codes."""
    if folder is None:
        return None
    guide = open_guide(folder)
    needs_codes = any(target.encoder == "tokenizer" for target in run.objective.targets.values())
    if needs_codes and not guide.num_codes:
        raise ValueError(
            f"--guide {folder} has no codebook, recipe {run.name!r} predicts codes: make one by `python -m "
            f"pretrain.codebook {folder} --data DIR --out DIR`"
        )
    return guide


def with_guide(facts: DataFacts, guide: Guide | None) -> DataFacts:
    """The facts, and what the model must know of the guide."""
    if guide is None:
        return facts
    sha256 = facts.sha256 | {"guide": guide.sha256}
    return dataclasses.replace(facts, guide_width=guide.width, guide_codes=guide.num_codes, sha256=sha256)


def is_told_by_this_rank(error: Exception) -> bool:
    """True on the first rank that fails with this message, so that what all ranks find wrong is told once."""
    if not dist.is_initialized():
        return rank_of_launcher() == 0 or isinstance(
            error, ConnectionError
        )  # which node fails to meet matters
    try:
        return dist.distributed_c10d._get_default_store().add(f"told/{error}", 1) == 1
    except (RuntimeError, ValueError):  # rank 0 hosts the store: it has told its error and gone
        return False


def rank_of_launcher() -> int:
    """This process's rank as the launcher says it, also before the process group exists."""
    return int(os.environ.get("RANK", "0"))
