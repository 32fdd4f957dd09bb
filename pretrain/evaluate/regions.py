"""How well do predicted regions cover the true ones, how sure is that, and what would the ground alone give?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUND = 0  # class of the pixels that belong to no thing
DRAWS = 1000  # bootstrap samples of the interval
SEED = 0  # of the bootstrap: one set of counts has one interval
FEWEST = 2  # images that differ, without which nothing tells how sure a score is


def count_pixels(
    predicted: Int[Tensor, "n h w"], truth: Int[Tensor, "n h w"], num_classes: int
) -> Int[Tensor, "n 3 k"]:
    """Pixels of each image by class: rightly predicted, predicted, true. It is all that an IoU reads."""
    n = len(truth)
    rows = num_classes * torch.arange(n)[:, None]  # the classes of each image get numbers of their own
    said, true = predicted.flatten(1).long() + rows, truth.flatten(1).long() + rows
    counts = [
        torch.bincount(c.flatten(), minlength=n * num_classes) for c in (said[said == true], said, true)
    ]
    return torch.stack(counts).view(3, n, num_classes).transpose(0, 1)


def iou(counts: Float[Tensor, "*b 3 k"]) -> Float[Tensor, "*b k"]:
    """Intersection over union of each class; NaN for a class that is neither predicted nor true."""
    right, said, true = counts.unbind(-2)
    return right / (said + true - right)


def score_regions(
    counts: Int[Tensor, "n 3 k"], names: Sequence[str], everywhere: int = GROUND
) -> dict[str, Any]:
    """Mean IoU over the classes that are predicted or true somewhere, with a bootstrap interval over images.

    Pixels are summed over the images before the division, as usual. The 95 % interval is that of the percentiles
    of DRAWS samples of n images with replacement; of a single image there is none, and `no_interval` says why.
    `chance` and `majority` both say class `everywhere` everywhere.
    """
    n = len(counts)
    exact = counts.double()
    total = exact.sum(0)
    constant = _one_class(total, everywhere)
    return {
        "accuracy": float(iou(total).nanmean()),
        "metric": "mIoU",
        **_interval(exact),
        "n": n,
        "pixel_accuracy": float(total[0].sum() / total[2].sum()),
        "chance": constant,
        "majority": constant,
        "iou": {
            name: value for name, value in zip(names, iou(total).tolist(), strict=True) if value == value
        },
    }


def _interval(counts: Float[Tensor, "n 3 k"]) -> dict[str, Any]:
    n = len(counts)
    if n < FEWEST:
        why = f"no interval, which takes {FEWEST} images or more, and {n} was tested on"
        return {"interval": None, "no_interval": why}
    weights = torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(SEED))
    weights = torch.zeros(DRAWS, n).scatter_add_(1, weights, torch.ones(DRAWS, n)).double()
    drawn = (weights @ counts.flatten(1)).unflatten(1, counts.shape[1:])
    bounds = iou(drawn).nanmean(-1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {"interval": bounds.tolist()}


def _one_class(total: Float[Tensor, "3 k"], said: int) -> float:
    """Mean IoU of the prediction that every pixel is of class `said`."""
    only = torch.zeros_like(total)
    only[0, said], only[1, said], only[2] = total[2, said], total[2].sum(), total[2]
    return float(iou(only).nanmean())
