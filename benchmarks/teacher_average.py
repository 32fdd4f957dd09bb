"""How much faster is the teacher's average on each rank's own slices than on gathered weights, under ZeRO-1, 2 and 3?

    python benchmarks/teacher_average.py [--rounds 20]

Two gloo ranks on a CPU, ViT-S with its classifier, in float32 and in bfloat16 with float32 master weights. Ours is
`TeacherAverage.update`, of which the average itself communicates nothing under any stage; under ZeRO-1 and 2 the copy
in the model's precision is gathered then, under ZeRO-3 by the next forward pass. The other is what one writes by
gathering. Under ZeRO-3, in float32, deepspeed.zero.GatheredParameters: weights of student and teacher are gathered,
rank 0 averages, the teacher is divided again; all at once, and parameter by parameter. Under ZeRO-1 and 2 the float32
master weights, which are divided among the ranks, are gathered, and every rank averages the whole. The fastest of the
other forms counts. In turns, median of the rounds, the slower rank's time. All leave the same teacher. Writes
benchmarks/results/teacher_average.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.ranks import WORLD, measure_on_ranks
from benchmarks.record import keep
from pretrain.collectives import rank, world_size
from pretrain.distributed import start_distributed
from pretrain.ds_config import read_ds_config, resolve_config
from pretrain.ema import TeacherAverage
from pretrain.engine import Engine
from pretrain.facts import DataFacts
from pretrain.main import quieten
from pretrain.pretrainer import Pretrainer
from pretrain.recipes import load
from pretrain.towers import Towers

ROOT = Path(__file__).resolve().parent.parent
MOMENTUM = 0.99
GOAL = 15
CASES = [(3, "float32"), (1, "float32"), (2, "float32"), (1, "bfloat16"), (2, "bfloat16")]
OURS = "own slices"


def engine_of(stage: int, dtype: str) -> Engine:
    run = load("m3i.vit_b16")
    backbone = replace(run.backbone, size="vit_s16")
    run = replace(run, batch=8, backbone=backbone)
    facts = DataFacts(categories=tuple(map(str, range(1000))), vocab_size=0)
    ds_config = read_ds_config(ROOT / "ds_configs" / f"zero{stage}.json")
    config, _ = resolve_config(
        ds_config | {"bf16": {"enabled": dtype == "bfloat16"}}, run, torch.device("cpu")
    )
    torch.manual_seed(0)
    return Engine(Pretrainer(run, facts), Towers(run, facts), run, config)


def average_gathered(student: nn.Module, teacher: nn.Module, together: bool) -> None:
    """Under ZeRO-3."""
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


class WholeAverage:
    """Under ZeRO-1 and 2: a float32 average of all weights on every rank, from the gathered master weights."""

    @torch.no_grad()
    def __init__(self, average: TeacherAverage, teacher: nn.Module) -> None:
        self._average = average
        owned = [part for part in average.slices if part.numel]
        parts: list[list[Any]] = [[] for _ in range(world_size())]
        dist.all_gather_object(parts, owned)
        longest = max(sum(part.numel for part in of_rank) for of_rank in parts)
        self._rows = torch.zeros(world_size(), longest)
        self._mine = torch.zeros(longest)
        self._teacher = dict(teacher.named_parameters())
        self._whole = {name: torch.zeros(p.numel()) for name, p in self._teacher.items()}
        self._sources, self._targets = [], []
        for row, of_rank in zip(self._rows, parts, strict=True):
            sizes = [part.numel for part in of_rank]
            self._sources += row[: sum(sizes)].split(sizes)
            self._targets += [self._whole[p.name][p.start : p.start + p.numel] for p in of_rank]
        self._gather(average.state().values())
        torch._foreach_copy_(self._targets, self._sources)

    def _gather(self, slices: Any) -> None:
        torch.cat(list(slices), out=self._mine[: sum(one.numel() for one in slices)])
        dist.all_gather(list(self._rows.unbind()), self._mine)

    @torch.no_grad()
    def update(self) -> None:
        self._gather(self._average._masters())
        torch._foreach_lerp_(self._targets, self._sources, 1 - MOMENTUM)
        views = [self._whole[name].view_as(p) for name, p in self._teacher.items()]
        torch._foreach_copy_([p.data for p in self._teacher.values()], views)


def weights_of(module: nn.Module) -> list[Tensor]:
    """What this rank has of a module: all of it, or its partition."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in module.parameters()]


def seconds(call: Callable[[], None]) -> float:
    dist.barrier()
    begun = time.perf_counter()
    call()
    taken = torch.tensor(time.perf_counter() - begun)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return taken.item()


def forms_of(engine: Engine) -> dict[str, Callable[[], None]]:
    """Ours and the others, all of which begin at the same weights."""
    ours = {OURS: lambda: engine.average.update(MOMENTUM)}
    student = engine._student.module.student
    with torch.no_grad():  # so that there is something to average
        for parameter in student.parameters() if engine.stage == 3 else ():
            parameter.ds_tensor.add_(0.1)
        for master in engine.average._masters():
            master.add_(0.1)
    if engine.stage < 3:
        whole = WholeAverage(engine.average, engine._teacher)
        return ours | {"gathered masters": whole.update}
    teacher = engine._teacher.module
    return ours | {
        "gathered at once": lambda: average_gathered(student, teacher, together=True),
        "gathered one by one": lambda: average_gathered(student, teacher, together=False),
    }


def measured(stage: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Seconds of every form under a stage, and what each rank receives from the others for it."""
    engine = engine_of(stage, dtype)
    teacher = engine._teacher.module if stage == 3 else engine._teacher
    before, left = weights_of(teacher), {}
    forms = forms_of(engine)
    for name, form in forms.items():
        for parameter, value in zip(teacher.parameters(), before, strict=True):
            getattr(parameter, "ds_tensor", parameter.data).copy_(value)
        form()
        left[name] = weights_of(teacher)
    for name in forms.keys() - {OURS}:
        torch.testing.assert_close(left[name], left[OURS], rtol=1e-5, atol=1e-6)
    times: dict[str, list[float]] = {name: [] for name in forms}
    without_copy = []
    publish = engine.average._publish
    for _ in range(rounds):
        for name, form in forms.items():
            times[name].append(seconds(form))
        engine.average._publish = lambda: None
        without_copy.append(seconds(forms[OURS]))
        engine.average._publish = publish
    medians = {name: median(values) for name, values in times.items()}
    fastest = min(value for name, value in medians.items() if name != OURS)
    numbers = sum(getattr(p, "ds_numel", p.numel()) for p in teacher.parameters())
    received = numbers * (WORLD - 1) // WORLD  # numbers of the other ranks
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    return {
        "stage": stage,
        "dtype": dtype,
        "parameters": numbers,
        "median_seconds": medians | {"own slices, without the copy": median(without_copy)},
        "least_seconds": {name: min(values) for name, values in times.items()},
        "most_seconds": {name: max(values) for name, values in times.items()},
        "megabytes_received": {
            "for the average": 0.0,
            "for the copy": 0.0 if stage == 3 else received * size / 1e6,
            "gathered": received * (4 if stage < 3 else 2 * size) / 1e6,
        },
        "times_as_fast": fastest / medians[OURS],
        "times_as_fast_without_the_copy": fastest / median(without_copy),
    }


def measure(rounds: int) -> None:
    quieten()
    torch.set_num_threads(1)
    start_distributed()
    found = [measured(stage, dtype, rounds) for stage, dtype in CASES]
    if rank() == 0:
        keep(
            "teacher_average",
            "the average on own slices against the same on gathered weights, two gloo ranks under ZeRO-1, 2 and 3",
            torch.device("cpu"),
            ranks=WORLD,
            rounds=rounds,
            goal=GOAL,
            cases=found,
        )
        for case in found:
            print(
                f"ZeRO-{case['stage']} {case['dtype']}: {case['times_as_fast']:.1f} times as fast, without the copy "
                f"{case['times_as_fast_without_the_copy']:.1f}: {case['median_seconds']}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    measure_on_ranks(__file__, __doc__.splitlines()[0], measure, rounds=20)
