"""How likely is the target given its prediction? Each entry returns nats in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretrain.collectives import mean_over_ranks, sum_over_ranks, world_size

DECORRELATION_WEIGHT = 5e-3  # of all correlations of one feature with others (Barlow Twins, arXiv 2103.03230)
EPS = 1e-5


def gaussian_nats(
    prediction: Float[Tensor, "n l d"], target: Float[Tensor, "n l d"], scored: Bool[Tensor, "n l"]
) -> Float[Tensor, ""]:
    """-log N(target; prediction, 1) per dimension, mean over the scored positions, without ln(2 pi) / 2.

    Every image must have the same number of scored positions, so that the mean over ranks is the global mean.
    At a prediction of 0 and targets of unit variance it is 0.5. Source: M3I, equation 8, sigma = 1.
    """
    squared = (prediction.float() - target.float()).square().mean(dim=-1)
    return 0.5 * (squared * scored).sum() / scored.sum()


def laplace_nats(
    prediction: Float[Tensor, "n l d"], target: Float[Tensor, "n l d"], scored: Bool[Tensor, "n l"]
) -> Float[Tensor, ""]:
    """-log Laplace(target; prediction, 1) per dimension, mean over the scored positions, without ln 2.

    As `gaussian_nats` otherwise. At a prediction of 0 and targets uniform in [-1, 1] it is 0.5.
    """
    distance = (prediction.float() - target.float()).abs().mean(dim=-1)
    return (distance * scored).sum() / scored.sum()


def cosine_nats(
    prediction: Float[Tensor, "n l d"], target: Float[Tensor, "n l d"], scored: Bool[Tensor, "n l"]
) -> Float[Tensor, ""]:
    """1 - cosine: -log of a von Mises-Fisher density of concentration 1 around the prediction's direction,
    mean over the scored positions, without its constant and with 1 added, so that agreement is 0.

    As `gaussian_nats` otherwise. At directions that have nothing to do with each other it is 1.
    """
    away = 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1)
    return (away * scored).sum() / scored.sum()


# score -> (prediction [n, l, d], target [n, l, d], scored [n, l]) -> nats of one position's features
POSITIONAL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gaussian": gaussian_nats,
    "laplace": laplace_nats,
    "cosine": cosine_nats,
}


def decorrelation_nats(prediction: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Barlow Twins: (1 - C_ii)^2 + w C_ij^2 summed over the cross-correlation C [d, d] of the global batch, a
    feature's mean; both sides standardised over the batch, in float32. w = DECORRELATION_WEIGHT.

    At predictions that have nothing to do with their targets it is about 1. The mean of its gradient over
    ranks is the gradient of the global loss. Source: Barlow Twins (arXiv 2103.03230), equation 1.
    """
    product = _standardised(prediction.float()).T @ _standardised(target.float()) / len(prediction)
    correlation = _global_mean(product)
    off = correlation - torch.diag(correlation.diagonal())
    total = (1 - correlation.diagonal()).square().sum() + DECORRELATION_WEIGHT * off.square().sum()
    return total / len(correlation)


def _standardised(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    centred = features - _global_mean(features.mean(0))
    return centred * (_global_mean(centred.square().mean(0)) + EPS).rsqrt()


def _global_mean(values: Tensor) -> Tensor:
    return _GlobalMean.apply(values)


class _GlobalMean(torch.autograd.Function):
    """Mean over ranks. Its gradient is the mean of all ranks' gradients: of the mean over ranks of the losses,
    once training has averaged the parameters' gradients over ranks.
    """

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return mean_over_ranks(values)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return mean_over_ranks(grad)


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
