"""How is DCNv3 sampled by gathering its corners, in plain torch or as torch.compile fuses it?"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

MULTIPLIED_POSITIONS = 196  # 14 x 14: largest map that is multiplied by all weights at once


def sample_reference(
    value: Float[Tensor, "n h w c"],
    x: Float[Tensor, "n ho wo g p"],
    y: Float[Tensor, "n ho wo g p"],
    mask: Float[Tensor, "n ho wo g p"],
) -> Float[Tensor, "n ho wo c"]:
    """Mask-weighted sum of the bilinear samples at pixels (x, y), by autograd: twice differentiable.

    Keeps every gathered corner for the backward pass: 4 p times the size of `value`.
    """
    return _weighted_corners(value, x, y, mask, _contract)


def sample_compiled(
    value: Float[Tensor, "n h w c"],
    x: Float[Tensor, "n ho wo g p"],
    y: Float[Tensor, "n ho wo g p"],
    mask: Float[Tensor, "n ho wo g p"],
) -> Float[Tensor, "n ho wo c"]:
    """`sample_reference` as torch.compile fuses it, by the variant that is faster for the map.

    Large maps: gathered corners, none of which reaches memory in the forward pass. Maps of up to
    MULTIPLIED_POSITIONS: the matrix of all weights from one position to another, times the map, without atomic
    sums. benchmarks/dcnv3_cpu.py times both at every shape, on a CPU: the product is the faster by more the
    smaller the map is, and keeps more for the backward pass from 12 x 12 on. Not measured on a GPU.

    Differentiable once; each variant is compiled at its first call, in seconds, for sizes in general: a map of
    one position or none, and a change of what needs a gradient, compile again, up to torch's limit of 8.
    """
    is_small = value.shape[1] * value.shape[2] <= MULTIPLIED_POSITIONS
    return _compiled(_dense if is_small else _gathered)(value, x, y, mask)


@cache
def _compiled(variant: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(variant, dynamic=True)


@no_type_check  # its caller checks shapes; torch.compile cannot trace a check
def _gathered(value: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return _weighted_corners(value, x, y, mask, _multiply_and_sum)


@no_type_check
def _dense(value: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    n, height, width, channels = value.shape
    _, out_height, out_width, groups, _ = x.shape
    left, top = x.detach().floor()[..., None], y.detach().floor()[..., None]
    right_share, bottom_share = x[..., None] - left, y[..., None] - top
    mask = mask[..., None] + 0 * (right_share + bottom_share)  # what is not finite stays so
    column = torch.arange(width, dtype=x.dtype, device=x.device)
    row = torch.arange(height, dtype=y.dtype, device=y.device)
    of_column = torch.where(column == left, 1 - right_share, torch.where(column == left + 1, right_share, 0))
    of_row = torch.where(row == top, 1 - bottom_share, torch.where(row == top + 1, bottom_share, 0))
    weights = ((mask * of_row)[..., None] * of_column[..., None, :]).sum(4)  # [n, ho, wo, g, h, w]
    weights = weights.permute(0, 3, 1, 2, 4, 5).reshape(n * groups, out_height * out_width, height * width)
    table = value.view(n, height * width, groups, channels // groups).transpose(1, 2).flatten(0, 1)
    out = torch.bmm(weights, table).view(n, groups, out_height, out_width, channels // groups)
    return out.permute(0, 2, 3, 1, 4).flatten(3)


@no_type_check  # its callers check shapes; torch.compile cannot trace a check
def _weighted_corners(
    value: Tensor, x: Tensor, y: Tensor, mask: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    n, height, width, channels = value.shape
    _, out_height, out_width, groups, points = x.shape
    table = value.view(n, height * width, groups, channels // groups).transpose(1, 2)
    left, top = x.detach().floor(), y.detach().floor()
    right_share, bottom_share = x - left, y - top
    out = 0
    for step_x, share_x in ((0, 1 - right_share), (1, right_share)):
        for step_y, share_y in ((0, 1 - bottom_share), (1, bottom_share)):
            column, row = left.long() + step_x, top.long() + step_y
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            place = place.permute(0, 3, 1, 2, 4).reshape(n, groups, -1, 1)
            corner = table.gather(2, place.expand(-1, -1, -1, channels // groups))
            corner = corner.unflatten(2, (out_height, out_width, points))
            weight = share_x * share_y * mask * inside
            out = out + weigh(corner, weight)
    return out.flatten(3)


@no_type_check
def _contract(corner: Tensor, weight: Tensor) -> Tensor:
    """Sum over the points of [n, g, h, w, p, d] times [n, h, w, g, p] -> [n, h, w, g, d], in one product."""
    return torch.einsum("nghwpd,nhwgp->nhwgd", corner, weight)


@no_type_check
def _multiply_and_sum(corner: Tensor, weight: Tensor) -> Tensor:
    """`_contract` in steps that a compiler fuses with the gathering: a matrix product would keep the corners."""
    return (corner.permute(0, 2, 3, 1, 4, 5) * weight[..., None]).sum(-2)
