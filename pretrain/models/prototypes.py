"""How near is an image to each prototype? Cosines, which Sinkhorn's algorithm turns into codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn


class Prototypes(nn.Module):
    """Projected features [n, width] to their cosines with `num` learned prototypes.

    Prototypes are normalised where they are used, in place of after every step: the gradient of a unit vector
    has no part along it. Source: SwAV (arXiv 2006.09882), section 3.1.
    """

    def __init__(self, width: int, num: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num, width))
        nn.init.normal_(self.weight, std=width**-0.5)  # all directions alike, lengths about 1

    def forward(self, features: Float[Tensor, "n width"]) -> Float32[Tensor, "n k"]:
        """Cosines in [-1, 1], computed in float32 whatever the dtype of features and parameters."""
        return F.normalize(features.float(), dim=-1) @ F.normalize(self.weight.float(), dim=-1).T
