"""Where does each patch of the target view lie in the input view's grid?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def relative_positions(
    boxes_input: Float[Tensor, "n 5"],
    boxes_target: Float[Tensor, "n 5"],
    width: Float[Tensor, " n"],
    grid: int,
) -> Float[Tensor, "n patches 4"]:
    """Position and size of every target patch, in units of the input view's patches.

    Boxes are top, left, height, width in pixels of the possibly flipped whole image, then 1 if it was
    flipped; `width` is the whole image's. Patches are row-major (y outer); the columns are y', x' (centre of
    the target patch, where the input's first patch has its centre at 0), ln(target height / input height)
    and ln(target width / input width). A box that equals the input's gives y' = y, x' = x, zeros. Float32.
    Boxes must have positive height and width: callers pass only views that were made.
    Source: SiameseIM (arXiv 2206.01204), section 3.2, with flips of the whole image before the crop.
    """
    top_in, left_in, height_in, width_in, flip_in = boxes_input.float().unbind(1)
    top_to, left_to, height_to, width_to, flip_to = boxes_target.float().unbind(1)
    scale_y, scale_x = height_to / height_in, width_to / width_in
    centres = torch.arange(grid, device=boxes_input.device, dtype=torch.float32) + 0.5
    offset_y = (top_to - top_in) / height_in * grid
    is_mirrored = flip_in != flip_to
    sign = torch.where(is_mirrored, -1.0, 1.0)
    first = torch.where(is_mirrored, width.float() - left_to, left_to)  # target's first edge, input's frame
    offset_x = (first - left_in) / width_in * grid
    y = scale_y[:, None] * centres + offset_y[:, None] - 0.5
    x = (sign * scale_x)[:, None] * centres + offset_x[:, None] - 0.5
    n = y.shape[0]
    columns = (
        y[:, :, None].expand(n, grid, grid),
        x[:, None, :].expand(n, grid, grid),
        scale_y.log()[:, None, None].expand(n, grid, grid),
        scale_x.log()[:, None, None].expand(n, grid, grid),
    )
    return torch.stack(columns, dim=-1).flatten(1, 2)
