"""How do tokens keep a spread that a short run can learn from? Standardised over the global batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.collectives import mean_over_ranks

MOMENTUM = 0.1  # share of a batch in the running statistics, as in torch's BatchNorm
EPS = 1e-5


class TokenNorm(nn.Module):
    """Batch normalisation of tokens [b, l, d] without affine: every channel has mean 0, variance 1.

    In training the statistics are those of all tokens of all ranks, so any number of ranks gives the same
    result; in eval mode they are running averages, kept in float32 whatever the parameters' dtype. A small
    network that starts from nothing otherwise adds one large constant to all tokens, and the image targets
    are that constant: they are predicted perfectly and teach nothing (benchmarks/token_norm.py).
    Source: BatchNorm (arXiv 1502.03167); its part against collapse: BYOL (arXiv 2006.07733), section 5.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        if not self.training:
            return ((tokens.float() - self.mean) * (self.variance + EPS).rsqrt()).to(tokens.dtype)
        out, mean, variance = _Standardise.apply(tokens, self.mean.clone())
        with torch.no_grad():
            self.mean.lerp_(mean, MOMENTUM)
            self.variance.lerp_(variance, MOMENTUM)
        return out

    def scale_and_shift(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """(a, b) with eval output = a x tokens + b: what a preceding linear layer can take over."""
        scale = (self.variance + EPS).rsqrt()
        return scale, -self.mean * scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenNorm:
        """Moves the statistics with the module but keeps them in float32: a bfloat16 average stands still."""
        super()._apply(fn, recurse)
        self.mean, self.variance = self.mean.float(), self.variance.float()
        return self


class _Standardise(torch.autograd.Function):
    """(tokens - mean) / deviation over all ranks; also gives mean and variance, which carry no gradient."""

    @staticmethod
    def forward(ctx, tokens: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shifted = tokens.float() - near  # near the mean, so that squares do not cancel
        moments = torch.stack([shifted.mean((0, 1)), shifted.square().mean((0, 1))])
        mean, square = mean_over_ranks(moments).unbind()
        variance = (square - mean.square()).clamp(min=0)
        scale = (variance + EPS).rsqrt()
        out = (shifted - mean) * scale
        ctx.save_for_backward(out, scale)
        mean = mean + near
        ctx.mark_non_differentiable(mean, variance)
        return out.to(tokens.dtype), mean, variance

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        out, scale = ctx.saved_tensors
        wide = grad.float()
        moments = torch.stack([wide.mean((0, 1)), (wide * out).mean((0, 1))])
        mean, projection = mean_over_ranks(moments).unbind()
        return ((wide - mean - out * projection) * scale).to(grad.dtype), None
