"""Which examples does a step show, and which of them on this rank? One order, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.collectives import from_every_rank, on_every_rank, rank, world_size
from pretrain.data.faults import BadSample
from pretrain.randomness import step_seed
from pretrain.transfer.recipes import Optimisation


class Draws(Dataset):
    """Position in the order of training -> an augmented example, or why there is none.

    Every epoch has an order of its own; what a position shows depends on it and the seed alone.
    """

    def __init__(self, num_examples: int, draw: Callable[[int], Any], seed: int) -> None:
        self.num_examples, self.draw, self.seed = num_examples, draw, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> Any:
        epoch, place = divmod(position, self.num_examples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num_examples, generator=generator)
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.manual_seed(step_seed(self.seed, position, 0))  # whose low 32 bits alone count on a CPU
            try:
                return self.draw(int(self._order[place]))
            except BadSample as error:
                return error.reason, str(error)


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
