"""What does the loss balance cost, against none and against one that goes backward twice?

    python benchmarks/balance_overhead.py [--rounds 12]

Two gloo ranks on a CPU, one thread each, the demo's model with 64 images a rank, float32: forward and backward passes
of the student without DeepSpeed, targets computed once. In turns: without any balance; with ours, whose node at the
encoder's output sees both gradients in one backward pass; and with image and label losses that go backward through
the whole model one after the other, so that each side's gradient stands by itself. Medians of the rounds, of the
slower rank. Two such medians cannot tell 0.5 % apart, so that the balance's own calls are timed inside the step too,
its all-reduce included, after the ranks have met, as they do where the gradient is reduced: their share is the claim.
All three leave the same gradient. Writes benchmarks/results/balance_overhead.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ranks import WORLD, measure_on_ranks
from benchmarks.record import keep
from pretrain import pretrainer
from pretrain.balance import BalanceTracker, fork
from pretrain.collectives import rank, sum_over_ranks, world_size
from pretrain.distributed import start_distributed
from pretrain.main import quieten
from pretrain.recipes import load
from pretrain.scoring import SCORES, Step
from pretrain.targets import TargetEncoders, encode
from pretrain.towers import Towers
from tests.fakes import FACTS, random_batch

IMAGES = 64  # a rank
GOALS = {"share_of_step": 0.005, "backward_twice_by_ours": 1.6}


class Student:
    """Model, batch and targets; one forward and backward pass in each of three forms."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        run = load("m3i.demo")
        self.model, teacher = pretrainer.Pretrainer(run, FACTS), Towers(run, FACTS)
        self.batch, self.tracker = random_batch(run, IMAGES, seed=rank()), BalanceTracker(run.objective.gamma)
        said = {"dtype": torch.float32, "grid": self.model.grid}
        self.z_y = encode(run, self.model.targets, self.batch, TargetEncoders(teacher.eval()), **said)
        self.own = 0.0  # seconds in the balance's own calls

    def forward(self, at_output: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Image and label losses; `at_output` gives the features for either."""
        pretrainer.fork = at_output
        self.model.zero_grad()
        step = Step(
            self.model, self.model._encode(self.batch, self.tracker, torch.float32), self.z_y, self.tracker
        )
        sums: dict[str, Any] = {"image": 0.0, "label": 0.0}
        for name, target in self.model.targets.items():
            sums[target.group] = sums[target.group] + SCORES[target.kind](step, name, target).nats
        return sums

    def plain(self) -> list[float]:
        times = [time.perf_counter()]
        sums = self.forward(lambda features, tracker: (features, features))
        times.append(time.perf_counter())
        (sums["image"] + sums["label"]).backward()
        return [*times, time.perf_counter()]

    def balanced(self) -> list[float]:
        observe, self.own = self.tracker.observe, 0.0
        self.tracker.observe = self.timed(observe)
        times = [time.perf_counter()]
        sums = self.forward(self.timed(fork))
        times.append(time.perf_counter())
        (sums["image"] + sums["label"]).backward()
        dist.barrier()  # where the gradient's own reduction would make the ranks wait for one another
        self.timed(self.tracker.advance)()
        times.append(time.perf_counter())
        self.tracker.observe = observe
        return times

    def backward_twice(self) -> list[float]:
        norms: list[Tensor] = []

        def both(features: Tensor, tracker: BalanceTracker) -> tuple[Tensor, Tensor]:
            features.register_hook(lambda gradient: norms.append(gradient.norm().square()))
            return features, features

        times = [time.perf_counter()]
        sums = self.forward(both)
        times.append(time.perf_counter())
        sums["image"].backward(retain_graph=True)
        sums["label"].backward()
        sum_over_ranks(torch.stack(norms)).sqrt().div_(world_size())
        return [*times, time.perf_counter()]

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def told(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = call(*arguments)
            self.own += time.perf_counter() - begun
            return result

        return told

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def slower(*seconds: float) -> list[float]:
    taken = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return taken.tolist()


def measure(rounds: int) -> None:
    quieten()
    torch.set_num_threads(1)
    start_distributed()
    student = Student()
    forms = {"plain": student.plain, "balanced": student.balanced, "backward twice": student.backward_twice}
    gradients = {}
    for name, form in forms.items():  # warms up too
        form()
        gradients[name] = student.gradient()
        away = (gradients[name] - gradients["plain"]).norm() / gradients["plain"].norm()
        assert away < 1e-5, f"{name} leaves another gradient: {away:.1e} of its norm away"
    times: dict[str, list[list[float]]] = {name: [] for name in forms}
    shares = []
    for _ in range(rounds):
        for name, form in forms.items():
            dist.barrier()
            begin, middle, end = form()
            times[name].append(slower(end - begin, end - middle))
            if name == "balanced":
                shares.append(slower(student.own / (end - begin))[0])
    steps, backwards = ({n: median(row[i] for row in rows) for n, rows in times.items()} for i in (0, 1))
    found = {
        "share_of_step": median(shares),
        "balanced_by_plain": steps["balanced"] / steps["plain"],
        "step_twice_by_ours": steps["backward twice"] / steps["balanced"],
        "backward_twice_by_ours": backwards["backward twice"] / backwards["balanced"],
    }
    if rank() == 0:
        keep(
            "balance_overhead",
            "the balance's share of a student step, and how much longer one takes that goes backward twice",
            torch.device("cpu"),
            ranks=WORLD,
            images_a_rank=IMAGES,
            rounds=rounds,
            median_step_seconds=steps,
            median_backward_seconds=backwards,
            most_share_of_step=max(shares),
            goals=GOALS,
            **found,
        )
        print(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    measure_on_ranks(__file__, __doc__.splitlines()[0], measure, rounds=12)
