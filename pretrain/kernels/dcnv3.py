"""What does DCNv3 compute, and which implementation computes it here?

out[q] = sum_k mask_k bilinear(value, q stride - padding + centre + (grid_k dilation + offset_k) offset_scale)
for every output position q and group, value zero outside its map. Points k run over x first, y inside;
offsets are (x, y) pairs in pixels. Derivatives with respect to offsets are one-sided where a location is an
integer (as at initialisation, all of them): the cell is the floor, so they are forward differences.
Source: "InternImage" (arXiv 2211.05778), Section 3.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pretrain.kernels.dcnv3_sparse import sample_sparse


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
    path: str | None = None,
) -> Float[Tensor, "n ho wo c"]:
    """Deformable convolution, version 3, without its projections; out has the dtype of `value`.

    offset is [n, ho, wo, groups * points * 2] in pixels, mask [n, ho, wo, groups * points] after its softmax,
    with points = kernel_size**2 - remove_center and ho = (h + 2 padding - dilation (kernel_size - 1) - 1) //
    stride + 1. Locations and sums are float32 for narrower dtypes, since bfloat16 cannot tell neighbouring
    pixels of a large map apart. `path` overrides the choice of `choose_path`, for tests and measurements.

    Raises ValueError for shapes that contradict the options, and for an unknown path.
    """
    points = sampling_points(kernel_size, remove_center)
    _check_shapes(value, offset, mask, kernel_size, stride, padding, dilation, groups, len(points))
    path = path or choose_path(value.dtype)
    if path not in PATHS:
        raise ValueError(f"dcnv3 path={path!r} is unknown; choose from {sorted(PATHS)}")
    dtype = torch.promote_types(value.dtype, torch.float32)
    n, height, width, _ = offset.shape
    centre = dilation * (kernel_size - 1) // 2
    grid = torch.tensor(points, dtype=dtype, device=offset.device) * dilation - centre
    shift_x, shift_y = offset.to(dtype).view(n, height, width, groups, len(points), 2).unbind(-1)
    start = centre - padding
    columns = torch.arange(start, start + width * stride, stride, dtype=dtype, device=offset.device)
    rows = torch.arange(start, start + height * stride, stride, dtype=dtype, device=offset.device)
    x = torch.add(columns[:, None, None] + grid[:, 0] * offset_scale, shift_x, alpha=offset_scale)
    y = torch.add(rows[:, None, None, None] + grid[:, 1] * offset_scale, shift_y, alpha=offset_scale)
    return PATHS[path](value.to(dtype), x, y, mask.to(dtype).view(x.shape)).to(value.dtype)


def sample_reference(
    value: Float[Tensor, "n h w c"],
    x: Float[Tensor, "n ho wo g p"],
    y: Float[Tensor, "n ho wo g p"],
    mask: Float[Tensor, "n ho wo g p"],
) -> Float[Tensor, "n ho wo c"]:
    """Mask-weighted sum of the bilinear samples at pixels (x, y), by autograd: twice differentiable.

    Keeps every gathered corner for the backward pass: 4 p times the size of `value`.
    """
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
            out = out + torch.einsum("nghwpd,nhwgp->nhwgd", corner, weight)
    return out.flatten(3)


PATHS = {"reference": sample_reference, "sparse": sample_sparse}


def choose_path(dtype: torch.dtype) -> str:
    """Name of the implementation for values of this dtype.

    float64 is for proofs (gradcheck needs double backward); anything else takes the sparse path, which on
    one CPU thread was faster at every measured shape (benchmarks/dcnv3_cpu.py) and keeps no gathered corners.
    """
    return "reference" if dtype == torch.float64 else "sparse"


def sampling_points(kernel_size: int, remove_center: bool) -> list[tuple[int, int]]:
    """(x, y) steps of the regular grid in the published order: x outside, y inside."""
    middle = kernel_size // 2
    steps = range(kernel_size)
    return [(i, j) for i in steps for j in steps if not (remove_center and i == j == middle)]


def _check_shapes(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    points: int,
) -> None:
    reach = dilation * (kernel_size - 1) + 1
    n, height, width, channels = value.shape
    grid = (n, (height + 2 * padding - reach) // stride + 1, (width + 2 * padding - reach) // stride + 1)
    if channels % groups:
        raise ValueError(f"dcnv3 channels={channels} must be a multiple of groups={groups}")
    for name, tensor, numbers in (("offset", offset, 2), ("mask", mask, 1)):
        expected = (*grid, groups * points * numbers)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"dcnv3 {name} has shape {tuple(tensor.shape)}, but a value of {tuple(value.shape)} with "
                f"kernel_size={kernel_size}, stride={stride}, padding={padding}, dilation={dilation}, "
                f"groups={groups} and {points} points needs {expected}"
            )
