"""Which images does a step of fine-tuning show, and which of them on this rank?

The order and what becomes of each image depend on the seed and the position alone, so that any number of ranks sees
the same batches. timm's mixing pairs the images of a batch from its two ends, so a rank has both of a pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain.collectives import from_every_rank, on_every_rank, rank, world_size
from pretrain.config import Run
from pretrain.data.batch import NO_CATEGORY
from pretrain.data.faults import check_bad_share
from pretrain.data.views import cut, draw_crop
from pretrain.evaluate.augment import rand_augment
from pretrain.evaluate.divided import epoch_order
from pretrain.evaluate.features import Picture, Pictures
from pretrain.evaluate.fine_tune_recipes import FineTune

READ_AT_ONCE = 256  # images of a rank that one worker reads together
STEPS_AT_ONCE = 100  # at least, or an epoch, that the same workers read: an epoch of few images is one step


@dataclass(frozen=True)
class Examples:
    """The labelled, readable samples of a data set."""

    folder: Path
    index: Int[Tensor, " n"]  # of the samples in the data set
    labels: Int[Tensor, " n"] | None = None  # their categories; a state of a training tells of them
    sha256: str = ""  # of what the folder holds, as `sha256_of`, likewise


@dataclass(frozen=True)
class Batch:
    """What this rank shows at a step."""

    views: UInt8[Tensor, "b 3 s s"]
    labels: Int[Tensor, " b"]
    index: tuple[int, ...]  # of the samples in the data set
    counts: Bool[
        Tensor, " b"
    ]  # not: an image that could not be read this time, or one that another rank counts


class Augmentations:
    """Pictures as fine-tuning shows them; indexable by epoch and sample number, for torch's DataLoader."""

    def __init__(self, pictures: Pictures, run: Run, settings: FineTune) -> None:
        self.pictures, self.run, self.settings = pictures, run, settings
        self.shards = pictures.shards

    def __getitem__(self, place: tuple[int, int]) -> Picture:
        epoch, index = place
        view = partial(_augment, run=self.run, settings=self.settings, epoch=epoch)
        return self.pictures.of(index, view)


class Reader:
    """Batches of some images by this rank; what has become unreadable since is counted, over all ranks.

    An error of one rank is raised by all.
    """

    def __init__(self, pictures: Pictures | Augmentations, limit: float) -> None:
        self.pictures, self.limit = pictures, limit
        self.dropped: Counter[str] = Counter()
        self.num_seen = 0.0

    def batches(
        self, shares: Sequence[Sequence[Any]], of_all: float, workers: int
    ) -> Iterator[list[Picture]]:
        """The pictures of each share; `of_all` samples are in a share of all ranks together, on average. Collective.

        A share has what indexes the pictures. DataError when too many cannot be read.
        """
        loader = DataLoader(
            self.pictures,
            batch_sampler=shares,
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),  # its own: torch's global one is the model's
        )
        found = on_every_rank(lambda: iter(loader))
        for _ in shares:
            pictures = on_every_rank(lambda: next(found))
            bad = from_every_rank([(p.reason, p.message) for p in pictures if p.view is None])
            self.dropped.update(reason for reason, _ in bad)
            self.num_seen += of_all
            if bad:
                told = f"{self.pictures.shards.folder}: {bad[-1][1]}"
                check_bad_share(self.dropped, round(self.num_seen), self.limit, told)
            yield pictures


def own_pairs(order: Sequence[int]) -> tuple[list[int], bool]:
    """Those of a batch that this rank shows, ends first, and whether they count: a rank without a pair of its own
    shows the first one, for nothing.
    """
    pairs = len(order) // 2
    first, last = rank() * pairs // world_size(), (rank() + 1) * pairs // world_size()
    counts = first < last
    if not counts:
        first, last = 0, 1
    return [*order[first:last], *order[len(order) - last : len(order) - first]], counts


def steps_of(num_images: int, batch: int) -> int:
    """Whole batches of one epoch; what is left over comes in another one."""
    return num_images // batch


def training_batches(
    train: Examples, run: Run, settings: FineTune, batch: int, begun: int, workers: int, reader: Reader
) -> Iterator[Batch]:
    """Those of this rank from step `begun` on, to the last; every epoch has an order of its own."""
    an_epoch = steps_of(len(train.index), batch)
    # As many on each rank: all are told of what could not be read after every piece.
    num_pieces = -(-batch // (READ_AT_ONCE * world_size()))

    @lru_cache(maxsize=1)
    def order_of(epoch: int) -> list[int]:
        return train.index[epoch_order(settings.seed, epoch, len(train.index))].tolist()

    steps, at_once = settings.steps(an_epoch), max(an_epoch, STEPS_AT_ONCE)
    for first in range(begun, steps, at_once):
        own, pieces = [], []
        for step in range(first, min(first + at_once, steps)):
            epoch, place = divmod(step, an_epoch)
            own.append(own_pairs(order_of(epoch)[place * batch : (place + 1) * batch]))
            pieces += in_pieces([(epoch, index) for index in own[-1][0]], num_pieces)
        found = reader.batches(pieces, batch / num_pieces, workers)
        for share, counts in own:
            pictures = [picture for _ in range(num_pieces) for picture in next(found)]
            yield stacked(pictures, run.views.size, share, counts)


def in_pieces(share: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """A share cut into `count` parts of almost equal length, none of which is empty where it has so many."""
    return [share[i * len(share) // count : (i + 1) * len(share) // count] for i in range(count)]


def stacked(pictures: Sequence[Picture], size: int, share: Sequence[int], counts: bool = True) -> Batch:
    """Pictures as tensors; black, and not counted, where one could not be read."""
    black = torch.zeros(3, size, size, dtype=torch.uint8)
    return Batch(
        views=torch.stack([black if p.view is None else p.view for p in pictures]),
        labels=torch.tensor([0 if p.label == NO_CATEGORY else p.label for p in pictures]),
        index=tuple(share),
        counts=torch.tensor([counts and p.view is not None for p in pictures]),
    )


def _augment(
    image: UInt8[Tensor, "h w 3"], index: int, *, run: Run, settings: FineTune, epoch: int
) -> UInt8[Tensor, "3 s s"]:
    seed = f"{settings.seed}/{epoch}/{index}"
    generator = Random(seed)
    is_flipped = generator.random() < settings.flip
    box = draw_crop(image.shape[0], image.shape[1], settings.scale, run.views.ratio, generator)
    view = cut(image, box, is_flipped, run.views.size)
    if not settings.rand_augment:
        return view
    return rand_augment(view, settings.rand_augment, run.views.mean, generator.getrandbits(32))
