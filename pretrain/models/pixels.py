"""What does an encoder read of 8-bit views? Their colours, normalised channel by channel."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def normalise(
    views: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> Float[Tensor, "n 3 h w"]:
    """Views [n, 3, h, w] with levels 0 to 255 as (value / 255 - mean) / std, computed in float32, in `dtype`."""
    pixels = views.float() / 255
    # Plain numbers: a tensor of them, made on a GPU, would wait for the work that is queued there.
    channels = [
        (pixels[:, c] - shift) / scale for c, (shift, scale) in enumerate(zip(mean, std, strict=True))
    ]
    return torch.stack(channels, dim=1).to(dtype)
