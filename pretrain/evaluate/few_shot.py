"""How much do the features tell from few labels? Shares of the training images, drawn several times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from scipy.stats import t as student_t
from torch import Tensor

SEEDS = (0, 1, 2, 3, 4)  # of the draws


def draw(labels: Int[Tensor, " n"], share: int, seed: int) -> Int[Tensor, " m"]:
    """Rows of `share` per cent of each category, at least one, rising; the seed decides which."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for category in labels.unique().tolist():
        own = (labels == category).nonzero()[:, 0]
        count = max(round(share / 100 * len(own)), 1)
        rows.append(own[torch.randperm(len(own), generator=generator)][:count])
    return torch.cat(rows).sort().values


def over_draws(
    labels: Int[Tensor, " n"],
    share: int,
    heldout: Int[Tensor, " m"],
    predict: Callable[[Int[Tensor, " d"], int], Int[Tensor, " m"]],
    num_categories: int,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Mean accuracy over the draws, with its 95 % interval by Student's t: how it varies with the images drawn.

    `predict` gives the categories of the held-out images after it was taught by some rows, with a seed.
    """
    drawn = [draw(labels, share, seed) for seed in seeds]
    said = [predict(rows, seed) for rows, seed in zip(drawn, seeds, strict=True)]
    accuracies = torch.tensor([(s == heldout).double().mean().item() for s in said], dtype=torch.float64)
    mean = float(accuracies.mean())
    half = 0.0
    if len(seeds) > 1:
        half = float(student_t.ppf(0.975, len(seeds) - 1) * accuracies.std() / math.sqrt(len(seeds)))
    counts = torch.bincount(heldout, minlength=num_categories)
    return {
        "accuracy": mean,
        "interval": [max(mean - half, 0.0), min(mean + half, 1.0)],
        "n": len(heldout),
        "chance": 1 / num_categories,
        "majority": int(counts.max()) / len(heldout),
        "share": share / 100,
        "drawn_share": len(drawn[0]) / len(labels),  # larger where a category has one image at least
        "train_images": len(drawn[0]),
        "seeds": list(seeds),
        "accuracies": accuracies.tolist(),
    }
