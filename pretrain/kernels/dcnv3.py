"""What does DCNv3 compute, and which implementation computes it here?"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def dcnv3(
    value: Float[Tensor, "n h w c"],
    offset: Float[Tensor, "n ho wo gp2"],
    mask: Float[Tensor, "n ho wo gp"],
    *,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Float[Tensor, "n ho wo c"]:
    x, y = sampling_locations(
        offset, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    return sample_reference(value, x, y, mask)


def sampling_locations(offset, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center):
    n, ho, wo, _ = offset.shape
    dtype = torch.promote_types(offset.dtype, torch.float32)
    centre = dilation * (kernel_size - 1) // 2
    points = [
        (i, j)
        for i in range(kernel_size)
        for j in range(kernel_size)
        if not (remove_center and i == j == kernel_size // 2)
    ]
    grid = torch.tensor(points, dtype=dtype, device=offset.device) * dilation - centre
    shift = offset.to(dtype).reshape(n, ho, wo, groups, len(points), 2)
    place = (grid + shift) * offset_scale
    xs = torch.arange(wo, dtype=dtype, device=offset.device) * stride - padding + centre
    ys = torch.arange(ho, dtype=dtype, device=offset.device) * stride - padding + centre
    return xs[:, None, None] + place[..., 0], ys[:, None, None, None] + place[..., 1]


def sample_reference(value, x, y, mask):
    n, h, w, c = value.shape
    _, ho, wo, g, p = x.shape
    table = value.reshape(n, h * w, g, c // g).transpose(1, 2).to(x.dtype)
    weight = mask.reshape(x.shape).to(x.dtype)
    left, top = x.floor(), y.floor()
    fx, fy = x - left, y - top
    left, top = left.long(), top.long()
    out = 0
    for dx, wx in ((0, 1 - fx), (1, fx)):
        for dy, wy in ((0, 1 - fy), (1, fy)):
            col, row = left + dx, top + dy
            inside = (col >= 0) & (col < w) & (row >= 0) & (row < h)
            place = row.clamp(0, h - 1) * w + col.clamp(0, w - 1)
            place = place.permute(0, 3, 1, 2, 4).reshape(n, g, -1, 1).expand(-1, -1, -1, c // g)
            corner = table.gather(2, place).unflatten(2, (ho, wo, p))
            cw = (wx * wy * weight * inside).permute(0, 3, 1, 2, 4)
            out = out + torch.einsum("nghwpd,nghwp->nhwgd", corner, cw)
    return out.flatten(3).to(value.dtype)
