"""How is a run built, from its recipe and from what it left behind when it ended last?"""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.claim import Require, unclaimed
from pretrain import checkpoint, resume
from pretrain.checkpoint import PLACE_RECORD, Saver, place_name, record_place, step_of
from pretrain.checkpoint.stores import store_at
from pretrain.collectives import from_first_rank, on_every_rank, rank, world_size
from pretrain.compiled import check_compile, compile_blocks
from pretrain.config import Run
from pretrain.data import drop_list
from pretrain.data.loader import Loader
from pretrain.data.sources import tokenizer_folder
from pretrain.distributed import start_distributed
from pretrain.ds_config import describe, read_ds_config, resolve_config
from pretrain.engine import Engine
from pretrain.evaluate.in_training import TeacherCheck
from pretrain.evidence import Journal
from pretrain.exits import RankLost
from pretrain.facts import DataFacts
from pretrain.given_up import given_up
from pretrain.initial.begun import beginning, record
from pretrain.initial.start import Start
from pretrain.intact import write_text
from pretrain.lock import only_saver, only_writer
from pretrain.loop import Job, run_steps
from pretrain.models.guides import Guide, open_guide
from pretrain.monitor import Monitor
from pretrain.monitor.ranks import Sources
from pretrain.monitor.speed import Speed, measured_peak, peak_of
from pretrain.monitor.spent import Spent, spent_before
from pretrain.monitor.spent import forget as forget_spent
from pretrain.monitor.trackers import TRACKERS
from pretrain.monitor.trackers import forget as forget_id
from pretrain.monitor.window import Window
from pretrain.paths import Paths
from pretrain.place import Place
from pretrain.plan.flops import step_flops
from pretrain.preemption import Signals
from pretrain.pretrainer import Pretrainer
from pretrain.provenance import hardware
from pretrain.refused import leaving_nothing
from pretrain.replayable import needed
from pretrain.served import left_out
from pretrain.tellers import is_of_another_rank, is_of_device, is_told_by_this_rank
from pretrain.towers import Towers
from pretrain.watchdog import FIRST, REMEDY, Watchdog, meeting


@dataclass(frozen=True)
class Started:
    """What a rank has before it knows what there is to do."""

    config: dict[str, Any]  # of DeepSpeed
    machine: str  # what it trains on, in words
    device: torch.device
    signals: Signals
    watchdog: Watchdog
    require: Require  # of the place of checkpoints
    begun: float  # time.monotonic() at the start


def train(run: Run, paths: Paths) -> None:
    """Pre-trains from the newest whole checkpoint of the run, or from the beginning; on all ranks.

    Preempted, Postponed, Diverged and RankLost tell how else than finished or failed it ended.
    """
    begun = time.monotonic()
    ds_config = read_ds_config(paths.ds_config)
    device = start_distributed(paths.timeout * FIRST * 2)  # the watchdog, which names the rank, comes first
    with ExitStack() as held:
        try:
            # No watchdog yet: it writes beside the run, which another process may hold.
            with meeting(rank(), paths.timeout * FIRST):
                config, machine = resolve_config(ds_config, run, device)
                run.images_per_rank(world_size(), paths.micro_batches)  # refuses what does not divide
                require = _sole(held, paths)
        except RuntimeError as error:
            if not is_of_another_rank(error):
                raise
            first = str(error).splitlines()[0].partition(". ")[0]  # gloo goes on with advice
            told = f"a rank died at the start ({first}). {REMEDY}"
            raise RankLost(told if is_told_by_this_rank(error) else "") from error
        signals = held.enter_context(Signals())
        watchdog = held.enter_context(Watchdog(paths.out, rank(), world_size(), paths.timeout))
        started = Started(config, machine, device, signals, watchdog, require, begun)
        try:
            with ExitStack() as inner:
                _train(run, paths, started, inner)
        except RuntimeError as error:
            if is_of_device(error):
                told = f"{watchdog.here}: its device failed ({str(error).splitlines()[0]})"
                raise RankLost(f"{told}. {REMEDY}") from error
            if not is_of_another_rank(error):
                raise
            told, is_teller = watchdog.lost()
            raise RankLost(f"{told}. {REMEDY}" if told and is_teller else "") from error
    dist.destroy_process_group()  # NCCL complains of what is left to the end of the process


def _train(run: Run, paths: Paths, started: Started, held: ExitStack) -> None:
    """Builds the run and takes it to its end, as often as it goes back; `held` closes what is open then."""
    journal = Journal(paths.out)
    with resume.reaching(paths, is_held=True):
        folder = from_first_rank(lambda: _left_at(paths, journal))
        skipped = from_first_rank(lambda: resume.batches_left_out(folder, journal))
    held.enter_context(resume.reading(folder))
    first_step = 0 if folder is None else step_of(folder)
    window = held.enter_context(closing(Window(paths.profile, paths.out, first_step, run.steps)))
    if paths.compile:
        check_compile(run.backbone.family, describe(started.config)["stage"])
    read = partial(on_every_rank, device=started.device)  # no rank waits for another
    tokenizer = read(lambda: tokenizer_folder(run, paths.data, paths.tokenizer))
    guide = read_guide(run, paths.guide)
    dropped = drop_list.file_of(paths.out, rank(), world_size())
    load = partial(open_loader, run, paths, tokenizer, started.device, dropped_to=dropped)
    loader = read(lambda: held.enter_context(closing(load(first_step, skipped))))
    facts = with_guide(loader.facts, guide)
    start, facts = beginning(run, paths, facts, folder)  # None where the run goes on
    if folder is not None:  # refuses another recipe before minutes of building
        with resume.reaching(paths, is_held=True):
            resume.check_resumable(folder, run, facts)
    check = read(lambda: _check(run, paths, facts, tokenizer))
    engine = build_engine(run, facts, started.config, started.device, guide, paths, start)
    engine.guard.left_out |= skipped
    engine.guard.num_refused = from_first_rank(lambda: 0 if folder is None else journal.num_refused)
    engine.guard.rewinds = from_first_rank(lambda: [one.time for one in journal.rewinds()])
    gpu_hours = from_first_rank(lambda: _write_inputs(run, paths, start, is_new=folder is None))
    origin = start.told() if start is not None else []
    start = None  # the weights of a file, which the model has now
    with resume.reaching(paths, is_held=True):
        saver = _saver(engine, paths, facts, tokenizer, started, journal)
    job = Job(run, paths, engine, saver, journal, started.signals, started.watchdog, window, check)
    speed = speed_of(run, facts, engine)
    spent = Spent(world_size(), paths.price, gpu_hours, started.begun)
    made = f"{started.machine}, {engine.chosen}{', compiled blocks' if paths.compile else ''}"
    without = left_out(run, facts)
    trackers = [TRACKERS[name](paths.out, run) for name in paths.trackers if rank() == 0]
    for tracker in trackers:
        held.callback(tracker.close)
    follow = partial(Monitor, paths.out, run, clock=engine.clock, speed=speed, spent=spent, trackers=trackers)
    while True:
        if folder is not None:
            _restore(job, folder)
        sources = Sources(tuple(run.data), loader.cycle.to(engine.device))
        with follow(engine.steps_done, sources=sources) as monitor:
            monitor.say(f"{made}; {'from the beginning' if folder is None else f'from {folder}'}")
            monitor.say(speed.told(hardware(engine.device)))
            for line in (without, *(origin if folder is None else ())):
                if line:
                    monitor.say(line)
            if folder is None:  # a place that cannot be written to ends the run in its first minute
                saver.save(wait=True)
            folder = run_steps(job, loader, monitor)
        if folder is None:
            return
        loader.close()
        loader = read(lambda: held.enter_context(closing(load(step_of(folder), engine.guard.left_out))))  # noqa: B023


def _check(run: Run, paths: Paths, facts: DataFacts, tokenizer: Path | None) -> TeacherCheck | None:
    return TeacherCheck(run, facts, paths.evaluate_data, tokenizer) if paths.evaluate_every else None


def _saver(
    engine: Engine, paths: Paths, facts: DataFacts, tokenizer: Path | None, started: Started, journal: Journal
) -> Saver:
    """Keeps, beside what its own rules keep, what refused steps are run again from."""
    return Saver(
        engine,
        paths.kept,
        facts,
        tokenizer,
        started.require,
        given_up=lambda: given_up(paths.kept, journal.rewinds()),
        needed=lambda: needed(paths.out, paths.kept),
        beside=started.watchdog.beside,
    )


def _left_at(paths: Paths, journal: Journal) -> Place | None:
    """The checkpoint that the run goes on from, if any; by the first rank, which holds the place."""
    resume.require_same_place(paths.out, paths.kept)
    store_at(paths.kept).recover()  # a checkpoint may still have the name that a killed process gave it
    return resume.newest_or_none(paths.kept, journal.rewinds())


def _restore(job: Job, folder: Place) -> None:
    job.watchdog.at(step_of(folder), "reads a checkpoint", times=FIRST)
    with resume.reaching(job.paths, is_held=True):
        checkpoint.restore(job.engine, folder)
    job.saver.saved_step = step_of(folder)  # it is there, and need not be written again


def _sole(held: ExitStack, paths: Paths) -> Require:
    """The first rank holds what the run writes; Busy on all ranks when another process does. For the Saver."""
    require = unclaimed

    def hold() -> None:
        nonlocal require
        was_there = paths.out.exists()
        with resume.reaching(paths):  # by this rank alone: its job script counts the starts of all machines
            held.enter_context(only_writer(paths.out))
            held.enter_context(leaving_nothing(paths.out, world_size(), was_there=was_there))
            resume.require_mounted(paths)
            if paths.checkpoints is not None and paths.checkpoints != paths.out:  # that one is held already
                require = held.enter_context(only_saver(paths.checkpoints))

    from_first_rank(hold)
    return require


def build_engine(
    run: Run,
    facts: DataFacts,
    config: dict[str, Any],
    device: torch.device,
    guide: Guide | None,
    paths: Paths,
    start: Start | None = None,
) -> Engine:
    """The run before its first step, equal on all ranks; the teacher begins as the student."""
    torch.manual_seed(run.seed)
    with torch.device(device):
        model, teacher = Pretrainer(run, facts, paths.micro_batches), Towers(run, facts)
    if start is not None:
        start.fill(model.student)
    if paths.compile:
        compile_blocks(model)
        compile_blocks(teacher)
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


def _write_inputs(run: Run, paths: Paths, start: Start | None, *, is_new: bool) -> float:
    """What this start was given, for those who read the run's folder; the GPU-hours of the starts before it."""
    if is_new:  # what an earlier run in this folder had is not its own
        forget_id(paths.out)
        forget_spent(paths.out)
    write_text(paths.out / "recipe.json", run.to_json())
    places = {name: place_name(place) for name, place in paths.data.items()}
    write_text(paths.out / "data.json", json.dumps(places, indent=1))
    write_text(paths.out / PLACE_RECORD, record_place(paths.out, paths.kept))
    if start is not None:
        record(paths, start)
    return 0.0 if is_new else spent_before(paths.out)


def speed_of(run: Run, facts: DataFacts, engine: Engine) -> Speed:
    """What the run's figures are measured against, on all ranks at once: on a CPU they share its cores."""
    if engine.device.type == "cpu":
        peak = measured_peak(engine.dtype)
    else:
        peak = peak_of(hardware(engine.device), engine.dtype)
    return Speed(step_flops(run, facts), world_size(), peak)


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
