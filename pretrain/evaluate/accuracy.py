"""How often is a prediction right, how sure is that, and what would guessing give?"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

CLUSTERED = "Wilson at the effective number of samples, from the variance over clusters"
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


def wilson(correct: float, n: float) -> tuple[float, float]:
    """95 % score interval of a proportion; inside [0, 1] and right for few samples, unlike +- 1.96 sigma.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    share, z2 = correct / n, Z_95**2 / n
    center = (share + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return max(center - half, 0.0), min(center + half, 1.0)


def clustered(correct: Int[Tensor, " c"], counts: Int[Tensor, " c"]) -> dict[str, Any]:
    """As `proportion`, of samples that are no independent draws: cluster i has `correct[i]` of `counts[i]`.

    The 95 % interval is Wilson's at the effective number of samples, p (1 - p) / variance of p over the clusters, at
    most the samples; where all are right or all wrong, the number of clusters. Source: Franco, Little, Louis and
    Slud, "Comparative study of confidence intervals for proportions in complex sample surveys", JSSAM 2019.
    """
    total, n, num_clusters = int(correct.sum()), int(counts.sum()), len(counts)
    share, effective = total / n, float(num_clusters)
    if num_clusters > 1 and 0 < total < n:
        squares = float((correct.double() - share * counts).square().sum())
        variance = num_clusters / (num_clusters - 1) * squares / n**2
        effective = min(share * (1 - share) / variance, float(n)) if variance else float(n)
    interval = wilson(share * effective, effective)
    told = {"method": CLUSTERED, "clusters": num_clusters, "effective_n": effective}
    return {"accuracy": share, "interval": list(interval), "n": n, "interval_of": told}


def confusion_counts(
    predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], num_categories: int
) -> Int[Tensor, "k k"]:
    """Number of samples by true category (row) and predicted category (column)."""
    cells = torch.bincount(labels * num_categories + predicted, minlength=num_categories**2)
    return cells.view(num_categories, num_categories)
