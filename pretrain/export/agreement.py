"""Does the exported model compute what ours computes?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pretrain.export.names import NotProven

MIN_COSINE = 0.9999
MAX_DIFFERENCE = 0.01  # as a fraction of the largest value: a cosine does not see a factor
NUM_IMAGES = 2


@dataclass(frozen=True)
class Agreement:
    """How one output of the exported model compares with ours."""

    file: str  # the exported file
    output: str  # "stage 1", "tokens", "logits", ...
    size: int  # pixels, side of the images
    cosine: float  # the smallest over all feature vectors
    max_difference: float  # the largest over all numbers
    scale: float  # largest absolute value of ours, to judge the difference by

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.output} at {self.size} px: cosine >= {self.cosine:.7f}, max difference "
            f"{self.max_difference:.2e} (values up to {self.scale:.1f})"
        )


def random_images(size: int) -> Float[Tensor, "n 3 s s"]:
    """Normalised noise, the same every time."""
    return torch.randn(NUM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))


def summary(proof: list[Agreement]) -> list[str]:
    """One line a file and size: what was compared, and the worst of it."""
    groups: dict[tuple[str, int], list[Agreement]] = {}
    for agreement in proof:
        groups.setdefault((agreement.file, agreement.size), []).append(agreement)
    return [
        f"{file} at {size} px: {', '.join(a.output for a in group)}: cosine >= {min(a.cosine for a in group):.7f}, "
        f"max difference {max(a.max_difference for a in group):.2e} (values up to {max(a.scale for a in group):.1f})"
        for (file, size), group in groups.items()
    ]


def compare(
    file: str, output: str, size: int, ours: Float[Tensor, "*n d"], theirs: Float[Tensor, "*n d"]
) -> Agreement:
    """NotProven unless shapes are equal and every vector (last dimension) has a cosine above MIN_COSINE."""
    if ours.shape != theirs.shape:
        raise NotProven(
            f"{file}: {output} at {size} px: shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}"
        )
    cosine = F.cosine_similarity(ours.double(), theirs.double(), dim=-1).min().item()
    difference, scale = (ours - theirs).abs().max().item(), ours.abs().max().item()
    agreement = Agreement(file, output, size, cosine, difference, scale)
    # Written so that NaN fails too.
    if not (cosine > MIN_COSINE and difference < scale * MAX_DIFFERENCE):
        raise NotProven(
            f"{agreement}; the cosine must exceed {MIN_COSINE} and the difference stay below {MAX_DIFFERENCE:.0%}"
        )
    return agreement
