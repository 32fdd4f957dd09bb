"""What does DCNv3 compute, from offsets and masks or from packed rows?

out[q] = sum_k mask_k bilinear(value, q stride - padding + centre + (grid_k dilation + offset_k) offset_scale)
for every output position q and group, value zero outside its map. Points k run over x first, y inside;
offsets are (x, y) pairs in pixels. Derivatives with respect to offsets are one-sided where a location is an
integer (as at initialisation, all of them): the cell is the floor, so they are forward differences.
Source: "InternImage" (arXiv 2211.05778), Section 3.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pretrain.kernels.dcnv3_choice import Call, choose_path, compiler_obstacle, triton_obstacle
from pretrain.kernels.dcnv3_gather import sample_compiled, sample_reference
from pretrain.kernels.dcnv3_sparse import sample_sparse
from pretrain.kernels.packed_row import COLUMNS, unpack

PATHS = {"reference": sample_reference, "sparse": sample_sparse, "compiled": sample_compiled}
FUSED = "triton"  # the path that takes packed rows and no other


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
    All paths but the reference are differentiable once.

    Raises ValueError for shapes that contradict the options, for numbers that are not real, and for an unknown
    path.
    """
    _check_numbers(value, offset, mask)
    _check_at_least_one(kernel_size=kernel_size, stride=stride, dilation=dilation, groups=groups)
    points = sampling_points(kernel_size, remove_center)
    _check_shapes(value, offset, mask, kernel_size, stride, padding, dilation, groups, len(points))
    if path is None:
        width = value.shape[3] // groups
        grid = (kernel_size, stride, padding, dilation, remove_center)
        path = choose_path(Call(value.device.type, value.dtype, width, *grid, is_packed=False)).path
    _check_path(path, value.device.type)
    dtype = torch.promote_types(value.dtype, torch.float32)
    value, offset, mask = value.contiguous(), offset.contiguous(), mask.contiguous()
    n, height, width, _ = offset.shape
    if n == 0:
        nothing = value.sum() + (offset.sum() + mask.sum()).to(value.dtype)
        return nothing * value.new_zeros(0, height, width, value.shape[3])
    centre = dilation * (kernel_size - 1) // 2
    grid = torch.tensor(points, dtype=dtype, device=offset.device) * dilation - centre
    shift_x, shift_y = offset.to(dtype).view(n, height, width, groups, len(points), 2).unbind(-1)
    start = centre - padding
    columns = torch.arange(start, start + width * stride, stride, dtype=dtype, device=offset.device)
    rows = torch.arange(start, start + height * stride, stride, dtype=dtype, device=offset.device)
    x = torch.add(columns[:, None, None] + grid[:, 0] * offset_scale, shift_x, alpha=offset_scale)
    y = torch.add(rows[:, None, None, None] + grid[:, 1] * offset_scale, shift_y, alpha=offset_scale)
    return PATHS[path](value.to(dtype), x, y, mask.to(dtype).view(x.shape)).to(value.dtype)


def dcnv3_blended(
    value: Float[Tensor, "n h w c"],
    offset: Float[Tensor, "n ho wo gp2"],
    logits: Float[Tensor, "n ho wo g p"],
    scale: Float[Tensor, "n ho wo g"] | None = None,
    **options,
) -> Float[Tensor, "n ho wo c"]:
    """`dcnv3` from mask logits, blended with its own value: (1 - s) sampled + s value, s = sigmoid(scale).

    The mask's softmax runs in float32, whatever the dtype. No blend without `scale`. `options` are dcnv3's.
    """
    groups = logits.shape[3]
    # Over the first axis: over a last axis of nine, torch's softmax takes ten times as long on a CPU.
    points_first = logits.flatten(0, -2).t()
    mask = F.softmax(points_first, 0, dtype=torch.promote_types(value.dtype, torch.float32))
    mask = mask.t().to(value.dtype).contiguous().view(logits.shape)
    sampled = dcnv3(value, offset, mask.flatten(-2), groups=groups, **options)
    if scale is None:
        return sampled
    by_group = (tensor.unflatten(-1, (groups, -1)) for tensor in (sampled, value))
    return torch.lerp(*by_group, scale.sigmoid()[..., None]).flatten(-2)


def dcnv3_packed(
    value: Float[Tensor, "n h w c"],
    packed: Float[Tensor, "n h w g 32"],
    *,
    offset_scale: float = 1.0,
    has_scale: bool,
    is_atomic: bool = False,
    path: str | None = None,
) -> Float[Tensor, "n h w c"]:
    """`dcnv3_blended` for a 3 x 3 grid at stride 1 from packed rows (packed_row.py), without their columns
    of the centre scale unless `has_scale`; out has the dtype of `value`.

    On the Triton path this is one kernel forward. Its gradients are deterministic; `is_atomic` sums the
    gradient of the value by atomic additions instead, for comparison. Other paths unpack and ignore it.
    Raises ValueError for shapes that do not fit together, and for a path that is unknown or cannot run here.
    """
    _check_packed(value, packed)
    groups, device = packed.shape[3], value.device.type
    if path is None:
        path = choose_path(Call(device, value.dtype, value.shape[3] // groups)).path
    if path == FUSED:
        obstacle = triton_obstacle(device)
        if obstacle is not None:
            raise ValueError(f"dcnv3 path={path!r} cannot run on {device}: {obstacle}")
        from pretrain.kernels.dcnv3_triton import call_fused_dcnv3  # here: Triton is optional

        return call_fused_dcnv3(value, packed, offset_scale, has_scale, is_atomic)
    offset, logits, scale = unpack(packed)
    return dcnv3_blended(
        value, offset, logits, scale if has_scale else None, offset_scale=offset_scale, path=path
    )


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


def _check_numbers(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.ndim != 4:
            raise ValueError(
                f"dcnv3 needs maps [n, h, w, c] of floating point, not {tensor.dtype} with {tensor.ndim} axes"
            )


def _check_at_least_one(**options: int) -> None:
    for name, value in options.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"dcnv3 {name}={value} must be a whole number of at least 1")


def _check_packed(value: Tensor, packed: Tensor) -> None:
    _check_numbers(value)
    if packed.ndim != 5 or packed.shape[4] != COLUMNS or packed.dtype != value.dtype:
        raise ValueError(
            f"dcnv3 packed rows have shape {tuple(packed.shape)} in {packed.dtype}, but must be "
            f"[n, h, w, groups, {COLUMNS}] in the value's {value.dtype}"
        )
    groups = packed.shape[3]
    _check_at_least_one(groups=groups)
    if packed.shape[:3] != value.shape[:3] or value.shape[3] % groups or packed.device != value.device:
        raise ValueError(
            f"dcnv3 packed rows have shape {tuple(packed.shape)} on {packed.device}, but a value of "
            f"{tuple(value.shape)} on {value.device} needs [n, h, w, groups, 32] of the same n, h, w and "
            "device, with groups that divide its channels"
        )


def _check_path(path: str, device: str) -> None:
    if path == FUSED:
        raise ValueError(
            f"dcnv3 path={path!r} takes packed rows: call dcnv3_packed, or choose from {sorted(PATHS)}"
        )
    if path not in PATHS:
        raise ValueError(f"dcnv3 path={path!r} is unknown; choose from {sorted(PATHS)}")
    if path == "compiled" and not torch.compiler.is_compiling():
        obstacle = compiler_obstacle(device)
        if obstacle is not None:
            raise ValueError(f"dcnv3 path={path!r} cannot run on {device}: {obstacle}; or use another path")
