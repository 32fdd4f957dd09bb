"""What is taught or found in one image?"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Things:
    """Boxes with their classes; scores of those found, masks where there are any."""

    boxes: Float[Tensor, "n 4"]  # x0, y0, x1, y1 in pixels of the image
    labels: Int[Tensor, " n"]  # number of a name
    scores: Float[Tensor, " n"] | None  # in [0, 1]
    masks: UInt8[Tensor, "n h w"] | None  # 0 or 1


@dataclass(frozen=True)
class Shown:
    """One image of a training batch."""

    image: UInt8[Tensor, "3 h w"]
    things: Things
