"""How likely is the target given its prediction? Each entry returns nats in float32."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretrain.collectives import sum_over_ranks, world_size


def gaussian_nats(
    prediction: Float[Tensor, "n l d"], target: Float[Tensor, "n l d"], scored: Bool[Tensor, "n l"]
) -> Float[Tensor, ""]:
    """-log N(target; prediction, 1) per dimension, mean over the scored positions, without ln(2 pi) / 2.

    Every image must have the same number of scored positions, so that the mean over ranks is the global mean.
    At a prediction of 0 and targets of unit variance it is 0.5. Source: M3I, equation 8, sigma = 1.
    """
    squared = (prediction.float() - target.float()).square().mean(dim=-1)
    return 0.5 * (squared * scored).sum() / scored.sum()


def category_nats(
    logits: Float[Tensor, "n classes"],
    category: Int[Tensor, " n"],
    has_category: Bool[Tensor, " n"],
    smoothing: float,
) -> Float[Tensor, ""]:
    """Cross-entropy with label smoothing, mean over the labelled samples of the global batch.

    The mean of the result over ranks is the loss, and 0 if no rank has a label. Chance is ln(classes).
    """
    losses = F.cross_entropy(
        logits.float(), category.clamp(min=0), label_smoothing=smoothing, reduction="none"
    )
    count = sum_over_ranks(has_category.sum()).clamp(min=1)
    return (losses * has_category).sum() * world_size() / count
