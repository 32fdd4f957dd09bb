"""How likely is the target given its prediction? Nats in float32, an image; decorrelation alone is the batch's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretrain.collectives import mean_over_ranks, sum_over_ranks, world_size

DECORRELATION_WEIGHT = 5e-3  # of all correlations of one feature with others (Barlow Twins, arXiv 2103.03230)
EPS = 1e-5
LOG_FLOOR = math.log(1e-8)  # of a posterior in the Bernoulli loss, as in the published asymmetric loss


def gaussian_nats(
    prediction: Float[Tensor, "n l d"], target: Float[Tensor, "n l d"], scored: Bool[Tensor, "n l"]
) -> Float[Tensor, " n"]:
    """-log N(target; prediction, 1) per dimension, mean over an image's scored positions, without ln(2 pi) / 2.

    At a prediction of 0 and targets of unit variance it is 0.5. Source: M3I, equation 8, sigma = 1.
    """
    squared = (prediction.float() - target.float()).square().mean(dim=-1)
    return 0.5 * (squared * scored).sum(1) / scored.sum(1)


def laplace_nats(
    prediction: Float[Tensor, "n l d"], target: Float[Tensor, "n l d"], scored: Bool[Tensor, "n l"]
) -> Float[Tensor, " n"]:
    """-log Laplace(target; prediction, 1) per dimension, mean over an image's scored positions, without ln 2.

    As `gaussian_nats` otherwise. At a prediction of 0 and targets uniform in [-1, 1] it is 0.5.
    """
    distance = (prediction.float() - target.float()).abs().mean(dim=-1)
    return (distance * scored).sum(1) / scored.sum(1)


def cosine_nats(
    prediction: Float[Tensor, "n l d"], target: Float[Tensor, "n l d"], scored: Bool[Tensor, "n l"]
) -> Float[Tensor, " n"]:
    """1 - cosine: -log of a von Mises-Fisher density of concentration 1 around the prediction's direction,
    mean over an image's scored positions, without its constant and with 1 added, so that agreement is 0.

    As `gaussian_nats` otherwise. At directions that have nothing to do with each other it is 1.
    """
    away = 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1)
    return (away * scored).sum(1) / scored.sum(1)


# score -> (prediction [n, l, d], target [n, l, d], scored [n, l]) -> nats [n] of one position's features
POSITIONAL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gaussian": gaussian_nats,
    "laplace": laplace_nats,
    "cosine": cosine_nats,
}


def code_nats(
    logits: Float[Tensor, "n l k"], codes: Int[Tensor, "n l"], scored: Bool[Tensor, "n l"]
) -> Float[Tensor, " n"]:
    """Cross-entropy over the k codes of a codebook, mean over an image's scored positions. Chance is ln k.

    As `gaussian_nats` otherwise. Source: BEiT (arXiv 2106.08254).
    """
    losses = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten().long(), reduction="none")
    return (losses.view_as(scored) * scored).sum(1) / scored.sum(1)


def uniform_part(prediction: Float[Tensor, "n l d"], target: Float[Tensor, "n l d"]) -> Float[Tensor, " n"]:
    """What predictions share with all targets: p^T C p / d, mean over an image's positions; C [d, d] is the mean of
    t t^T over the positions of all ranks, in float32, without gradient.

    At predictions and targets of unit variance that have nothing to do with each other it is 1, at a
    prediction of 0 it is 0, and d where all of both are one direction of length sqrt(d). Added to a squared
    error it keeps the targets spread. Source: SiameseIM (arXiv 2206.01204); UniGrad (arXiv
    2112.05141).
    """
    p, t = prediction.float(), target.detach().float().flatten(0, 1)
    second_moment = mean_over_ranks(t.T @ t / len(t))
    return ((p @ second_moment) * p).sum(-1).mean(1) / p.shape[-1]


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


def mean_over_labelled(nats: Float[Tensor, " n"], is_labelled: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean over the labelled images of the global batch: the mean of the result over ranks, 0 if none is."""
    count = sum_over_ranks(is_labelled.sum()).clamp(min=1)
    return (nats * is_labelled).sum() * world_size() / count


def category_nats(
    logits: Float[Tensor, "n classes"], category: Int[Tensor, " n"], smoothing: float
) -> Float[Tensor, " n"]:
    """Cross-entropy with label smoothing; where `category` is negative, of no meaning. Chance is ln(classes)."""
    return F.cross_entropy(logits.float(), category.clamp(min=0), label_smoothing=smoothing, reduction="none")


def bernoulli_nats(
    logits: Float[Tensor, "n k"],
    is_positive: Bool[Tensor, "n k"],
    positive_weight: float,
    positive_focus: float,
    negative_focus: float,
) -> Float[Tensor, " n"]:
    """-weight (1 - p)^positive_focus ln p of tags that an image has, -p^negative_focus ln(1 - p) of the others,
    p = sigmoid(logit); SUM over the tags.

    With a weight of 1 and foci of 0 it is the Bernoulli negative log-likelihood in nats, k ln 2 at chance
    (p = 1/2); in general a positive is ln 2 weight / 2^positive_focus there, a negative ln 2 / 2^negative_focus.
    Logarithms are exact down to a floor of ln 1e-8: no tag is more than 18.4 nats (times weight), and one that is as
    wrong as that counts as an outlier, almost without gradient. Source: HVP-MTL (arXiv 2310.07510), section
    3.1, which leaves the minus signs out; asymmetric loss (arXiv 2009.14119).
    """
    log_p, log_not_p = F.logsigmoid(logits.float()), F.logsigmoid(-logits.float())
    # Powers as exponentials of logarithms: their gradients are finite at any p, also where a focus is below 1.
    positive = positive_weight * (positive_focus * log_not_p).exp() * log_p.clamp(min=LOG_FLOOR)
    negative = (negative_focus * log_p).exp() * log_not_p.clamp(min=LOG_FLOOR)
    return -torch.where(is_positive, positive, negative).sum(1)


def agreement_nats(student: Float[Tensor, "n k"], teacher: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """(KL(S || S') + KL(S' || S)) / 2 of the softmaxes S, S' of both sides' similarities; no gradient reaches
    the teacher.

    0 at equality, and never below. Source: HVP-MTL (arXiv 2310.07510), momentum distillation.
    """
    log_s = student.float().log_softmax(dim=1)
    log_t = teacher.detach().float().log_softmax(dim=1)
    # Both divergences in one sum, whose every term is positive or 0.
    return 0.5 * ((log_s.exp() - log_t.exp()) * (log_s - log_t)).sum(dim=1)
