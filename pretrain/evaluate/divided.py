"""What do ranks compute together of rows that each has a share of? What one rank computes of all, to rounding.

The rows of a data set stand in the order of the ranks, so that a row has the same number on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int
from torch import Tensor

from pretrain.collectives import from_first_rank, gather_rows, rank, sum_over_ranks, world_size

ROWS_AT_ONCE = 2**15  # looked at together in float64

T = TypeVar("T")
Ask = Callable[[Float64[Tensor, " p"]], Float64[Tensor, " q"]]


@dataclass(frozen=True)
class Division:
    """How many rows each rank has."""

    counts: tuple[int, ...]  # by rank

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def first(self) -> int:
        """Number, among all rows, of this rank's first."""
        return sum(self.counts[: rank()])

    def own(self, rows: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
        """Those of some rows that this rank has, as numbers among its own; in their order."""
        places = rows - self.first
        return places[(places >= 0) & (places < self.counts[rank()])]


def division(num_own: int) -> Division:
    """That of a data set of which this rank has `num_own` rows. A collective call."""
    return Division(tuple(gather_rows(torch.tensor([num_own])).tolist()))


def even_share(count: int) -> range:
    """Numbers of those of `count` things that this rank is to see to, where each has them all."""
    return range(rank() * count // world_size(), (rank() + 1) * count // world_size())


def epoch_order(seed: int, epoch: int, count: int) -> Int[Tensor, " n"]:
    """Numbers of all examples in the order of an epoch; the same on every rank and any number of them."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def step_rows(divided: Division, batch: int, epochs: int, seed: int) -> Iterator[Int[Tensor, " m"]]:
    """This rank's rows of each step, `batch` of all ranks together; what is left of an epoch comes in another."""
    for epoch in range(epochs):
        order = epoch_order(seed, epoch, divided.total)
        for step in range(divided.total // batch):
            yield divided.own(order[step * batch : (step + 1) * batch])


def moments(own: Float[Tensor, "n d"]) -> tuple[Float64[Tensor, " d"], Float64[Tensor, " d"]]:
    """Mean and variance (over n) of each column over the rows of all ranks, at least one. A collective call."""
    parts = own.split(ROWS_AT_ONCE)
    num_all = sum_over_ranks(torch.tensor(len(own)))
    mean = sum_over_ranks(sum(part.sum(dim=0, dtype=torch.float64) for part in parts)) / num_all
    squares = sum((part.double() - mean).square().sum(dim=0) for part in parts)
    return mean, sum_over_ranks(squares) / num_all


def share_of_right(said: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Accuracy over the rows of all ranks. A collective call."""
    counts = torch.tensor([int((said == labels).sum()), len(labels)])
    right, num_all = sum_over_ranks(counts).tolist()
    return right / num_all


def led(lead: Callable[[Ask], T], answer: Ask, size: int) -> T:
    """What `lead` returns on the first rank, told to all; it asks for sums over the ranks of what they `answer`.

    A question has `size` numbers. One rank alone decides how often to ask, so that processors that round otherwise
    cannot come apart. A collective call; an OSError or ValueError of `lead` is raised by all.
    """
    if world_size() == 1:
        return lead(answer)
    if rank() > 0:
        _answer_until_told(answer, size)
        return from_first_rank(lambda: None)

    def ask(question: Float64[Tensor, " p"]) -> Float64[Tensor, " q"]:
        dist.broadcast(torch.tensor(True), 0)
        dist.broadcast(question.contiguous(), 0)
        return sum_over_ranks(answer(question))

    def led_to_its_end() -> T:
        try:
            outcome = lead(ask)
        except (OSError, ValueError):  # not what a lost rank raises, which cannot be told anything
            dist.broadcast(torch.tensor(False), 0)
            raise
        dist.broadcast(torch.tensor(False), 0)
        return outcome

    return from_first_rank(led_to_its_end)


def _answer_until_told(answer: Ask, size: int) -> None:
    while True:
        is_asked = torch.tensor(False)
        dist.broadcast(is_asked, 0)
        if not is_asked:
            return
        question = torch.empty(size, dtype=torch.float64)
        dist.broadcast(question, 0)
        sum_over_ranks(answer(question))
