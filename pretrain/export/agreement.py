"""Does the exported model compute what ours computes?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MIN_COSINE = 0.9999
NUM_IMAGES = 2


class NotProven(Exception):
    """The exported file does not load as it must, or gives other features than the towers it was made from."""


@dataclass(frozen=True)
class Agreement:
    """How one output of the exported model compares with ours."""

    output: str  # which output, of which file
    size: int  # pixels, side of the images
    cosine: float  # the smallest over all feature vectors
    max_difference: float  # the largest over all numbers
    scale: float  # largest absolute value of ours, to judge the difference by

    def __str__(self) -> str:
        return (
            f"{self.output} at {self.size} px: cosine >= {self.cosine:.7f}, max difference "
            f"{self.max_difference:.2e} (values up to {self.scale:.1f})"
        )


def random_images(size: int) -> Float[Tensor, "n 3 s s"]:
    """Normalised noise, the same every time."""
    return torch.randn(NUM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))


def compare(output: str, size: int, ours: Float[Tensor, "*n d"], theirs: Float[Tensor, "*n d"]) -> Agreement:
    """NotProven unless shapes are equal and every vector (last dimension) has a cosine above MIN_COSINE."""
    if ours.shape != theirs.shape:
        raise NotProven(f"{output} at {size} px: shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
    cosine = F.cosine_similarity(ours.double(), theirs.double(), dim=-1).min().item()
    agreement = Agreement(output, size, cosine, (ours - theirs).abs().max().item(), ours.abs().max().item())
    # Written so that NaN fails too.
    if not (cosine > MIN_COSINE and agreement.max_difference < agreement.scale * 1e-2):
        raise NotProven(f"{agreement}; the cosine must exceed {MIN_COSINE} and the difference stay below 1 %")
    return agreement
