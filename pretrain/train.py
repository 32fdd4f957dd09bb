"""What happens between the first batch and the last checkpoint? THE loop."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain import checkpoint, resume
from pretrain.collectives import from_first_rank, rank, world_size
from pretrain.compiled import check_compile, compile_blocks
from pretrain.config import Run
from pretrain.data import drops
from pretrain.data.loader import Loader
from pretrain.data.remote import Place
from pretrain.data.sources import tokenizer_beside
from pretrain.distributed import start_distributed
from pretrain.ds_config import describe, read_ds_config, resolve_config
from pretrain.engine import Engine
from pretrain.facts import DataFacts
from pretrain.intact import write_text
from pretrain.lock import only_writer
from pretrain.models.guides import Guide, open_guide
from pretrain.monitor import Monitor
from pretrain.monitor.ranks import Sources
from pretrain.monitor.speed import Speed, measured_peak, peak_of
from pretrain.monitor.trackers import TRACKERS
from pretrain.monitor.window import Window
from pretrain.plan.flops import step_flops
from pretrain.pretrainer import Pretrainer
from pretrain.provenance import hardware
from pretrain.towers import Towers, targets_without_labels


@dataclass(frozen=True)
class Paths:
    """What of a start belongs to the machine and not to the recipe."""

    data: dict[str, Place]  # name of a source in the recipe -> its data set
    out: Path
    ds_config: Path
    tokenizer: Path | None = None  # folder; that of the first captioned data set if None
    guide: Path | None = None  # folder of the frozen encoder that targets need
    workers: int = 0  # processes that decode for each rank; 0 = the training process itself
    trackers: tuple[str, ...] = ()  # of pretrain.monitor.trackers, beside the log
    price: float | None = None  # of an hour of one GPU
    profile: tuple[int, int] | None = None  # first and last step that a profiler follows
    compile: bool = False  # transformer blocks by torch.compile


def train(run: Run, paths: Paths) -> None:
    """Pre-trains from the newest whole checkpoint in `paths.out`, or from the beginning; on all ranks."""
    ds_config = read_ds_config(paths.ds_config)
    device = start_distributed()
    config, machine = resolve_config(ds_config, run, device)
    with ExitStack() as held:
        from_first_rank(lambda: held.enter_context(only_writer(paths.out)))
        _train(run, paths, config, machine, device, held)
    dist.destroy_process_group()  # NCCL complains of what is left to the end of the process


def _train(
    run: Run, paths: Paths, config: dict[str, Any], machine: str, device: torch.device, held: ExitStack
) -> None:
    folder = from_first_rank(lambda: resume.newest_or_none(paths.out))
    first_step = 0 if folder is None else checkpoint.step_of(folder)
    window = Window(paths.profile, paths.out, first_step, run.steps)
    held.callback(window.close)
    if paths.compile:
        check_compile(run.backbone.family, describe(config)["stage"])
    tokenizer = tokenizer_folder(run, paths)
    place = {"rank": rank(), "world": world_size()}
    guide = read_guide(run, paths.guide)
    loader = Loader(
        run,
        paths.data,
        tokenizer,
        **place,
        workers=paths.workers,
        start_step=first_step,
        dropped_to=drops.file_of(paths.out, **place),
        device=device,
    )
    held.enter_context(closing(loader))
    facts = with_guide(loader.facts, guide)
    if folder is not None:  # refuses another recipe before minutes of building
        resume.check_resumable(folder, run, facts, **describe(config))
    torch.manual_seed(run.seed)  # equal weights on all ranks
    with torch.device(device):
        model, teacher = Pretrainer(run, facts), Towers(run, facts)
    compiled = compile_blocks(model) + compile_blocks(teacher) if paths.compile else 0
    engine = Engine(model, teacher, run, config, guide)
    if folder is not None:
        checkpoint.restore(engine, folder)
    if rank() == 0:
        write_text(paths.out / "recipe.json", run.to_json())
        places = {name: str(p.resolve()) if isinstance(p, Path) else p for name, p in paths.data.items()}
        write_text(paths.out / "data.json", json.dumps(places, indent=1))
    speed = speed_of(run, facts, engine, paths.price)
    with Monitor(
        paths.out,
        run,
        first_step,
        engine.clock,
        sources=Sources(tuple(run.data), loader.cycle.to(device)),
        speed=speed,
        trackers=[TRACKERS[name](paths.out, run, first_step) for name in paths.trackers if rank() == 0],
    ) as monitor:
        used = ", ".join([machine, engine.chosen, *([f"{compiled} compiled blocks"] if compiled else [])])
        monitor.say(f"{used}; {'from the beginning' if folder is None else f'from {folder}'}")
        monitor.say(speed.told(hardware(device)))
        if line := left_out(run, facts):
            monitor.say(line)
        if folder is None:
            checkpoint.save(engine, paths.out, facts, tokenizer)
        batches = iter(loader)
        while engine.steps_done < run.steps:
            window.before(engine.steps_done + 1)
            with monitor.waiting_for_data():
                batch = next(batches)
            losses = engine.step(batch)
            with engine.clock.during("log"):
                trace = window.after(engine.steps_done)
            if trace is not None:
                monitor.say(f"traced {trace}")
            monitor.after_step(engine, losses, loader.dropped, loader.captions)
            if engine.steps_done % run.save_every == 0 or engine.steps_done == run.steps:
                with monitor.saving():
                    saved = checkpoint.save(engine, paths.out, facts, tokenizer)
                monitor.say(f"saved {saved}")


def speed_of(run: Run, facts: DataFacts, engine: Engine, price: float | None) -> Speed:
    """What the run's figures are measured against, on all ranks at once: on a CPU they share its cores."""
    if engine.device.type == "cpu":
        peak = measured_peak(engine.dtype)
    else:
        peak = peak_of(hardware(engine.device), engine.dtype)
    return Speed(step_flops(run, facts), world_size(), peak, price)


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
