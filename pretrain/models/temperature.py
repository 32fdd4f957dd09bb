"""How sharply do images and texts choose each other? A learned inverse temperature with an upper bound."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Temperature(nn.Module):
    """Learned inverse temperature exp(log_scale), at most `max_scale` (CLIP, section 2.5)."""

    def __init__(self, init_scale: float, max_scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([init_scale]).log())
        self.max_scale = max_scale

    def forward(self) -> Float[Tensor, ""]:
        return _AtMost.apply(self.log_scale.float().exp(), self.max_scale)[0]


class _AtMost(torch.autograd.Function):
    """min(values, limit); above the limit the gradient may still lead down, so no value is stuck there."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(values > limit)
        return values.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (is_above,) = ctx.saved_tensors
        return grad.masked_fill(is_above & (grad < 0), 0.0), None
