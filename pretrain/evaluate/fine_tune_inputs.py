"""What does the trained module read at a step of fine-tuning? Images that are erased in and mixed, or features."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from pretrain.config import Run
from pretrain.evaluate.fine_tune_order import Batch
from pretrain.evaluate.fine_tune_recipes import FineTune
from pretrain.evaluate.frozen import FrozenClassifier
from pretrain.models.pixels import normalise


@dataclass(frozen=True)
class Inputs:
    """What the trained module reads at a step, and what it shall say."""

    values: Float[Tensor, "b ..."]  # images, or features of them
    targets: Float[Tensor, "b k"] | Int[Tensor, " b"]
    counts: Bool[Tensor, " b"]


class Augmented:
    """What becomes of views on the device: erasing image by image, then mixing with one draw for all of a step."""

    def __init__(self, run: Run, settings: FineTune, num_categories: int, device: torch.device) -> None:
        self.run, self.settings, self.device = run, settings, device
        self.mix = Mixup(
            settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=num_categories
        )
        self.mix.mixup_enabled = settings.mixup > 0 or settings.cutmix > 0
        self.erase = RandomErasing(settings.erasing, mode="pixel", device=device)

    def __call__(self, shown: Batch, step: int, epoch: int) -> Inputs:
        views = self.run.views
        images = normalise(shown.views.to(self.device), views.mean, views.std, torch.float32)
        if self.settings.erasing:
            for image, index in zip(images, shown.index, strict=True):
                reseed(self.settings.seed, epoch, index, 1)
                self.erase(image)  # in place
        reseed(self.settings.seed, step)
        return Inputs(*self.mix(images, shown.labels.to(self.device)), shown.counts.to(self.device))


class FrozenFeatures:
    """Views become the features that a head reads; what does not count is left out, so that no statistic has it."""

    def __init__(self, run: Run, model: FrozenClassifier) -> None:
        self.run, self.model = run, model

    def __call__(self, shown: Batch, step: int, epoch: int) -> Inputs:
        # One that does not count is seen where no other is: an encoder may want at least one.
        rows = shown.counts if shown.counts.any() else torch.arange(len(shown.counts)) < 1
        values = self.model.features(shown.views[rows], self.run)[: int(shown.counts.sum())]
        labels = shown.labels[shown.counts].to(values.device)
        return Inputs(values, labels, torch.ones(len(labels), dtype=torch.bool, device=values.device))


def reseed(*numbers: int) -> None:
    """Python's, numpy's and torch's global generators from numbers; `seeded` around it puts them back."""
    seed = random.Random("/".join(map(str, numbers))).getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
