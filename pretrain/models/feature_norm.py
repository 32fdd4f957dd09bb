"""How do features keep a spread that a short run can learn from? Standardised over the global batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.collectives import mean_over_ranks

MOMENTUM = 0.1  # share of a batch in the running statistics, as in torch's BatchNorm
EPS = 1e-5


class FeatureNorm(nn.Module):
    """Batch normalisation of features [..., d] without affine: every channel has mean 0, variance 1.

    In training the statistics are those of all rows of all ranks, so any number of ranks gives the same
    result (torch's SyncBatchNorm knows GPUs only); in eval mode they are running averages, kept in float32
    whatever the parameters' dtype. A small network that starts from nothing otherwise adds one large constant
    to all features: as targets of images they are predicted perfectly and teach nothing
    (benchmarks/feature_norm.py).
    Source: BatchNorm (arXiv 1502.03167); its part against collapse: BYOL (arXiv 2006.07733), section 5.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        if not self.training:
            return ((features.float() - self.mean) * (self.variance + EPS).rsqrt()).to(features.dtype)
        out, mean, variance = standardise(features, self.mean.clone())
        with torch.no_grad():  # the optimizer skips a batch that is not finite, and so does the average
            is_finite = mean.isfinite() & variance.isfinite()
            self.mean.lerp_(torch.where(is_finite, mean, self.mean), MOMENTUM)
            self.variance.lerp_(torch.where(is_finite, variance, self.variance), MOMENTUM)
        return out

    @torch.no_grad()
    def fold_into(self, layer: nn.Module, *added: nn.Module) -> None:
        """Hands what eval mode does to the layers whose summed outputs it normalises; it may go afterwards.

        Each has weight [n, ...] and bias [n], n = d, or a multiple of d when a PixelShuffle follows it.
        `layer` takes the shift.
        """
        scale = (self.variance + EPS).rsqrt()
        for one in (layer, *added):
            factor = scale.repeat_interleave(one.weight.shape[0] // scale.numel())
            one.weight *= factor.view(-1, *[1] * (one.weight.ndim - 1))
            one.bias *= factor
        layer.bias -= self.mean * scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureNorm:
        """Moves the statistics with the module but keeps them in float32, unrounded: a bfloat16 average stands
        still.
        """
        kept = (self.mean, self.variance)
        super()._apply(fn, recurse)
        if not kept[0].is_meta:
            self.mean, self.variance = (old.to(self.mean.device) for old in kept)
        return self


def standardise(
    features: Float[Tensor, "*b d"], near: Float[Tensor, " d"]
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Features with mean 0 and variance 1 over all rows of all ranks, and the mean and variance that they had.

    The statistics are float32 without gradient; `near` is any guess of the mean. A collective call, forward and
    backward, with as many rows on every rank.
    """
    return _Standardise.apply(features, near)


class _Standardise(torch.autograd.Function):
    """(x - mean) / deviation over all ranks; also gives mean and variance, which carry no gradient."""

    @staticmethod
    def forward(ctx, features: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = features.flatten(0, -2).float() - near  # near the mean, so that squares do not cancel
        moments = torch.stack([rows.mean(0), rows.square().mean(0)])
        mean, square = mean_over_ranks(moments).unbind()
        variance = (square - mean.square()).clamp(min=0)
        scale = (variance + EPS).rsqrt()
        out = ((rows - mean) * scale).view_as(features)
        ctx.save_for_backward(out, scale)
        mean = mean + near
        ctx.mark_non_differentiable(mean, variance)
        return out.to(features.dtype), mean, variance

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        out, scale = ctx.saved_tensors
        wide = grad.float()
        moments = torch.stack([wide.flatten(0, -2).mean(0), (wide * out).flatten(0, -2).mean(0)])
        mean, projection = mean_over_ranks(moments).unbind()
        return ((wide - mean - out * projection) * scale).to(grad.dtype), None


FEATURE_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "batch": FeatureNorm,
}
