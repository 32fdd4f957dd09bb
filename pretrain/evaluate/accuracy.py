"""How often is a prediction right, how sure is that, and what would guessing give?"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

Z_95 = 1.959963984540054  # standard normal quantile of 0.975


def score(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], num_categories: int) -> dict[str, Any]:
    """Accuracy with its 95 % interval, next to two ways of guessing.

    `chance` guesses uniformly among the categories, `majority` always says the most frequent label.
    """
    counts = torch.bincount(labels, minlength=num_categories)
    return proportion(int((predicted == labels).sum()), len(labels)) | {
        "chance": 1 / num_categories,
        "majority": int(counts.max()) / len(labels),
    }


def proportion(correct: int, n: int) -> dict[str, Any]:
    """`correct` of `n` as accuracy with its 95 % interval."""
    return {"accuracy": correct / n, "interval": list(wilson(correct, n)), "n": n}


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion; inside [0, 1] and right for few samples, unlike +- 1.96 sigma.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    share, z2 = correct / n, Z_95**2 / n
    center = (share + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return max(center - half, 0.0), min(center + half, 1.0)


def confusion_counts(
    predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], num_categories: int
) -> Int[Tensor, "k k"]:
    """Number of samples by true category (row) and predicted category (column)."""
    cells = torch.bincount(labels * num_categories + predicted, minlength=num_categories**2)
    return cells.view(num_categories, num_categories)
