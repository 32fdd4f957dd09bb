"""Which examples does a step show, and which of them on this rank? One order, whatever the number of ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.collectives import from_every_rank, on_every_rank, rank, world_size
from pretrain.data.faults import BadSample
from pretrain.randomness import step_seed
from pretrain.transfer.recipes import Optimisation


class Draws(Dataset):
    """Position in the order of training -> an augmented example, or why there is none.

    Every epoch has an order of its own; what a position shows depends on it and the seed alone. With `repeats` an
    epoch shows an example as often as that says, rounded down or up by chance: a little more than it says of all, so
    that epochs are equally long.
    """

    def __init__(
        self,
        num_examples: int,
        draw: Callable[[int], Any],
        seed: int,
        repeats: Float[Tensor, " num_examples"] | None = None,
    ) -> None:
        self.draw, self.seed, self._repeats, self._examples = draw, seed, repeats, num_examples
        self.length = num_examples if repeats is None else math.ceil(float(repeats.sum()))  # of an epoch
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> Any:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._ordered(epoch)
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.manual_seed(step_seed(self.seed, position, 0))  # whose low 32 bits alone count on a CPU
            try:
                return self.draw(int(self._order[place]))
            except BadSample as error:
                return error.reason, str(error)

    def _ordered(self, epoch: int) -> Int[Tensor, " length"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self._examples, generator=generator)
        if self._repeats is None:
            return order
        ends = self._repeats[order].double().cumsum(0)
        ends *= self.length / float(ends[-1])
        # One example at each whole number beyond a random start, of which there are `length`.
        ends = torch.ceil(ends - torch.rand((), generator=generator, dtype=torch.float64)).long()
        ends[-1] = self.length
        again = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long))
        return order.repeat_interleave(again)[torch.randperm(self.length, generator=generator)]


def repeat_factors(shown: Sequence[Collection[int]], threshold: float) -> Float[Tensor, " examples"]:
    """How often an epoch shows each example: max(1, sqrt(threshold / f)), f the share of the examples that have the
    rarest of its classes. `shown`: classes of each example. Source: LVIS, arXiv 1908.03195 (repeat factor
    sampling).
    """
    counts = Counter(name for classes in shown for name in classes)
    factor = {name: max(1.0, math.sqrt(threshold * len(shown) / count)) for name, count in counts.items()}
    most = [max((factor[name] for name in classes), default=1.0) for classes in shown]
    return torch.tensor(most, dtype=torch.float64)


@dataclass(frozen=True)
class Batch:
    """What a step shows on this rank, and what it cannot show on any."""

    examples: list[Any]  # as many as the rank's share; none when no example of the step can be used
    dropped: list[tuple[str, str]]  # reason and message, of all ranks


def share_of(optimisation: Optimisation) -> int:
    """Images of a step on each rank; ValueError where they are not equally many."""
    if optimisation.batch % world_size():
        fitting = [n for n in range(1, optimisation.batch + 1) if not optimisation.batch % n]
        raise ValueError(
            f"the recipe's batch of {optimisation.batch} images is that of all ranks together and {world_size()} "
            f"ranks cannot share it equally: start one of {fitting} ranks"
        )
    return optimisation.batch // world_size()


def batches(draws: Draws, optimisation: Optimisation, begun: int, workers: int) -> Iterator[Batch]:
    """Those of the steps from `begun` on. A rank shows the positions of its share, and in place of one that cannot
    be used the next that can, of the whole step. An error of one rank is raised by all.
    """
    size, share = optimisation.batch, share_of(optimisation)
    steps = [range(step * size, (step + 1) * size) for step in range(begun, optimisation.steps)]
    loader = DataLoader(
        draws,
        batch_sampler=[step[rank() * share : (rank() + 1) * share] for step in steps],
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # its own: the model's draws are no affair of the order
    )
    found = on_every_rank(lambda: iter(loader))
    for step in steps:
        own = on_every_rank(lambda: _filled(next(found), draws, step))  # noqa: B023  called at once
        yield Batch(own.examples, from_every_rank(own.dropped))


def _filled(found: list[Any], draws: Draws, step: range) -> Batch:
    """With good examples in place of bad ones: batch norms want as many as there shall be."""
    bad = [example for example in found if isinstance(example, tuple)]
    if not bad:
        return Batch(found, bad)
    first, size = rank() * len(found), len(step)
    for place, example in enumerate(found):
        if isinstance(example, tuple):
            others = (draws[step[(first + place + more) % size]] for more in range(1, size))
            found[place] = next((other for other in others if not isinstance(other, tuple)), None)
    return Batch([example for example in found if example is not None], bad)
