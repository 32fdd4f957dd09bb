"""What stands where in the 32 numbers that DCNv3 needs for one position and group?

18 offsets in pixels (x, y interleaved, points in the published order: x outside, y inside), 9 mask logits,
1 logit of the centre scale, 4 zeros of padding: 64 bytes in bfloat16, so that every row is aligned.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

POINTS = 9  # of the 3 x 3 grid
FIRST_LOGIT = 2 * POINTS  # column of the first mask logit
SCALE_LOGIT = 3 * POINTS  # column of the centre scale's logit
COLUMNS = 32


def unpack(
    packed: Float[Tensor, "n h w g 32"],
) -> tuple[Float[Tensor, "n h w g*18"], Float[Tensor, "n h w g 9"], Float[Tensor, "n h w g"]]:
    """Offsets as the plain operator takes them, mask logits, and the logit of the centre scale."""
    offset, logits, scale, _ = packed.split((FIRST_LOGIT, POINTS, 1, COLUMNS - SCALE_LOGIT - 1), dim=-1)
    return offset.flatten(-2), logits, scale.squeeze(-1)
