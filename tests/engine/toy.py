"""What is the smallest thing that the engine can train? Towers, a pre-trainer and batches of a few numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.balance import BalanceTracker, fork
from pretrain.collapse import Seen
from pretrain.config import Balance, Mask, Optim, Run, Source, Teacher, Views
from pretrain.data.batch import Batch
from pretrain.facts import DataFacts
from pretrain.objectives import OBJECTIVES
from pretrain.scoring import Each
from pretrain.targets import TargetEncoders

WIDTH = 24
NUM_CATEGORIES = 3
FACTS = DataFacts(categories=("a", "b", "c"), vocab_size=0)


def toy_run(**changes: Any) -> Run:
    """Ten steps of eight images at 16 px."""
    run = Run(
        name="toy",
        objective=OBJECTIVES["m3i"],
        data={"toy": Source("category")},
        batch=8,
        steps=10,
        views=Views(size=16),
        mask=Mask(patch=4),
        optim=Optim(lr=1e-2, warmup=2, clip=1.0),
        teacher=Teacher(0.9, 1.0),
        balance=Balance(decay=0.5),
        save_every=3,
        log_every=1,
    )
    return replace(run, **changes)


@dataclass(frozen=True)
class ToyLosses:
    total: Tensor
    nats: dict[str, Tensor]
    seen: dict[str, Seen]
    each: dict[str, Each] = field(default_factory=dict)


class ToyTowers(nn.Module):
    """Images [n, 3, 16, 16] to tokens [n, 16, WIDTH]; odd sizes, so that no share of two ranks is even."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(48, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.hidden = nn.Linear(WIDTH, 37)
        self.out = nn.Linear(37, WIDTH, bias=False)
        self.category = nn.Linear(WIDTH, NUM_CATEGORIES)
        self.drop = nn.Dropout(drop)
        self.register_buffer("shift", torch.full((WIDTH,), 0.25))

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n l d"]:
        patches = F.pixel_unshuffle(images, 4).flatten(2).transpose(1, 2)
        tokens = self.embed(patches)
        hidden = self.drop(F.gelu(self.hidden(self.norm(tokens))))
        if self.training:
            self.shift += 0.125  # a statistic that moves, as those of a batch norm do
        return tokens + self.out(hidden) + self.shift.to(tokens.dtype)


class ToyPretrainer(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.student, self.micro_batches = ToyTowers(drop), 1
        self.decoder = nn.Linear(WIDTH, WIDTH)

    def losses(self, batch: Batch, teacher: Callable, split: Callable) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, dense nats, category nats); `split` gives the tokens for either loss."""
        images = batch.views.to(next(self.parameters()).dtype) / 255
        tokens = self.student(images[:, 0])
        for_images, for_labels = split(tokens)
        with torch.no_grad():
            z_y = teacher(images[:, 1]).float()
        dense = (self.decoder(for_images).float() - z_y).square().mean()
        logits = self.student.category(for_labels.mean(dim=1)).float()
        return tokens, dense, F.cross_entropy(logits, batch.category)

    def forward(self, batch: Batch, encoders: TargetEncoders, tracker: BalanceTracker) -> ToyLosses:
        tokens, dense, category = self.losses(batch, encoders.ema, lambda tokens: fork(tokens, tracker))
        return ToyLosses(
            dense + tracker.weight * category,
            {"dense": dense.detach(), "category": category.detach()},
            {"dense": Seen(tokens.detach().mean(dim=1))},
        )


def toy_batch(step: int, num_images: int, rank: int = 0, world: int = 1) -> Batch:
    """Rank's share of the global batch of a step; the same images for any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    views = torch.randint(0, 256, (num_images, 2, 3, 16, 16), generator=generator).to(torch.uint8)
    category = torch.randint(0, NUM_CATEGORIES, (num_images,), generator=generator)
    share = slice(rank * num_images // world, (rank + 1) * num_images // world)
    n = len(category[share])
    return Batch(
        views=views[share],
        boxes=torch.zeros(n, 2, 5),
        sizes=torch.full((n, 2), 16.0),
        mask=torch.zeros(n // 2, 1, 1, dtype=torch.bool),
        category=category[share],
        tokens=torch.zeros(n, 4, dtype=torch.long),
        token_mask=torch.zeros(n, 4, dtype=torch.bool),
        tags=torch.zeros(n, 0, dtype=torch.long),
        has_tags=torch.zeros(n, dtype=torch.bool),
        position=torch.arange(num_images)[share] + step * num_images,
    )


def build_toy(drop: float = 0.0) -> tuple[ToyPretrainer, ToyTowers]:
    """Student and teacher; the teacher's own weights are to be overwritten."""
    torch.manual_seed(7)
    return ToyPretrainer(drop), ToyTowers(drop)
