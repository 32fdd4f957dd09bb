"""How much faster is the teacher's average on each rank's own slices than on gathered parameters?

    python benchmarks/teacher_average.py [--rounds 20]

Two gloo ranks on a CPU under ZeRO-3, ViT-S with its classifier in float32. Ours is `TeacherAverage.update`. The other
is what one writes with deepspeed.zero.GatheredParameters: weights of student and teacher are gathered, rank 0
averages, the teacher is divided again; all at once, and parameter by parameter; the faster of the two counts. In
turns, median of the rounds, the slower rank's time. Both leave the same teacher. Writes
benchmarks/results/teacher_average.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.ranks import WORLD, measure_on_ranks
from benchmarks.record import keep
from pretrain.collectives import rank
from pretrain.distributed import start_distributed
from pretrain.ds_config import read_ds_config, resolve_config
from pretrain.engine import Engine
from pretrain.facts import DataFacts
from pretrain.main import quieten
from pretrain.pretrainer import Pretrainer
from pretrain.recipes import load
from pretrain.towers import Towers

ROOT = Path(__file__).resolve().parent.parent
MOMENTUM = 0.99
GOAL = 15


def engine_of() -> Engine:
    run = load("m3i.vit_b16")
    backbone = replace(run.backbone, size="vit_s16")
    run = replace(run, batch=8, backbone=backbone)
    facts = DataFacts(categories=tuple(map(str, range(1000))), vocab_size=0)
    ds_config = read_ds_config(ROOT / "ds_configs" / "zero3.json") | {"bf16": {"enabled": False}}
    config, _ = resolve_config(ds_config, run, torch.device("cpu"))
    torch.manual_seed(0)
    return Engine(Pretrainer(run, facts), Towers(run, facts), run, config)


def average_gathered(student: nn.Module, teacher: nn.Module, together: bool) -> None:
    pairs = list(zip(student.parameters(), teacher.parameters(), strict=True))
    for group in [pairs] if together else [[pair] for pair in pairs]:
        ours, theirs = (list(side) for side in zip(*group, strict=True))
        with (
            deepspeed.zero.GatheredParameters(ours),
            deepspeed.zero.GatheredParameters(theirs, modifier_rank=0),
            torch.no_grad(),
        ):
            if rank() == 0:
                torch._foreach_lerp_([p.data for p in theirs], [p.data for p in ours], 1 - MOMENTUM)


def slices(module: nn.Module) -> list[Tensor]:
    return [parameter.ds_tensor.clone() for parameter in module.parameters()]


def seconds(call: Callable[[], None]) -> float:
    dist.barrier()
    begun = time.perf_counter()
    call()
    taken = torch.tensor(time.perf_counter() - begun)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return taken.item()


def measure(rounds: int) -> None:
    quieten()
    torch.set_num_threads(1)
    start_distributed()
    engine = engine_of()
    student, teacher = engine._student.module.student, engine._teacher.module
    with torch.no_grad():
        for parameter in student.parameters():  # so that there is something to average
            parameter.ds_tensor.add_(0.1)
        for master in engine.average._masters():
            master.add_(0.1)
    forms: dict[str, Callable[[], None]] = {
        "own slices": lambda: engine.average.update(MOMENTUM),
        "gathered at once": lambda: average_gathered(student, teacher, together=True),
        "gathered one by one": lambda: average_gathered(student, teacher, together=False),
    }
    before, left = slices(teacher), {}
    for name, form in forms.items():
        for parameter, value in zip(teacher.parameters(), before, strict=True):
            parameter.ds_tensor.copy_(value)
        form()
        left[name] = slices(teacher)
    for name in ("gathered at once", "gathered one by one"):
        torch.testing.assert_close(left[name], left["own slices"], rtol=1e-5, atol=1e-6)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            times[name].append(seconds(form))
    medians = {name: median(values) for name, values in times.items()}
    fastest = min(medians["gathered at once"], medians["gathered one by one"])
    if rank() == 0:
        keep(
            "teacher_average",
            "the average on own slices against the same on gathered parameters, two gloo ranks under ZeRO-3",
            torch.device("cpu"),
            ranks=WORLD,
            parameters=sum(p.ds_numel for p in student.parameters()),
            rounds=rounds,
            median_seconds=medians,
            least_seconds={name: min(values) for name, values in times.items()},
            most_seconds={name: max(values) for name, values in times.items()},
            times_as_fast=fastest / medians["own slices"],
            goal=GOAL,
        )
        print(f"{fastest / medians['own slices']:.1f} times as fast: {medians}")
    dist.destroy_process_group()


if __name__ == "__main__":
    measure_on_ranks(__file__, __doc__.splitlines()[0], measure, rounds=20)
