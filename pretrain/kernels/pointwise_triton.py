"""How do torch, autograd and torch.compile call the Triton kernels of what stands around DCNv3?

Custom operators with shapes for tracing and autograd registered. Import this module only where Triton is
installed; the kernels also run on CPU tensors where TRITON_INTERPRET=1 is set before Triton is imported.
Launch parameters follow from the shape: the kernels wait for memory, and what counts is whole vectors
(tests/kernels/test_pointwise_sass.py holds registers and instructions).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pretrain.kernels.dcnv3_launch import COMPILE_OPTIONS
from pretrain.kernels.triton_depthwise import depthwise_grad_taps_kernel, depthwise_kernel
from pretrain.kernels.triton_gelu import gelu_grad_kernel
from pretrain.kernels.triton_norm import norm_gelu_grad_kernel, norm_gelu_kernel
from pretrain.kernels.triton_residual import residual_norm_grad_kernel, residual_norm_kernel

NUMBERS = 1024  # that one program of an elementwise kernel takes
FORWARD, BACKWARD = 32, 16  # bytes of every tensor that a thread of a kernel of whole rows holds
MAX_WARPS = 16
GRAD_PROGRAMS = 1024  # at most, of a gradient: 8 on each of the 132 processors of an H200
ROWS_A_PROGRAM = 16  # at least, of a gradient: its partial sums are then a sixth of what it reads, or less
TAP_PROGRAMS = 2048  # of the taps' gradient, about


@dataclass(frozen=True)
class Rows:
    """Launch of a kernel that owns whole rows of channels."""

    rows: int  # power of 2
    channels: int  # power of 2, holds a row
    warps: int


def rows_launch(width: int, itemsize: int, held: int) -> Rows:
    """`held` bytes of every tensor a thread, as far as warps suffice."""
    channels = triton.next_power_of_2(width)
    rows = max(1, 1024 // channels)
    return Rows(rows, channels, warps=min(rows * channels * itemsize // (32 * held), MAX_WARPS))


@dataclass(frozen=True)
class Tile:
    """Launch of a depth-wise kernel."""

    runs: int  # of four columns each; power of 2
    channels: int  # power of 2 that divides the map's channels
    warps: int


def tile_launch(channels: int, itemsize: int) -> Tile:
    """One vector of 16 bytes and four columns a thread; up to 64 channels, as many as divide the map's."""
    part = min(channels & -channels, 64)
    return Tile(2048 // itemsize // part, part, warps=4)


@torch.library.custom_op(
    "pretrain::residual_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor? share, Tensor? gamma, Tensor? outer, Tensor? following, "
    "float eps) -> (Tensor, Tensor)",
)
def residual_norm(
    x: Tensor,
    branch: Tensor,
    share: Tensor | None,
    gamma: Tensor | None,
    outer: Tensor | None,
    following: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x + share gamma norm(branch) [n, h, w, c], and its norm; the latter is empty without `following`."""
    x, branch = x.contiguous(), branch.contiguous()
    vectors = _or_dummy(x, share, gamma, outer, following)
    total = torch.empty_like(x)
    normed = torch.empty_like(x) if following is not None else x.new_empty(0)
    rows, per_image, width = _row_counts(x)
    launch = rows_launch(width, x.element_size(), FORWARD)
    residual_norm_kernel[(triton.cdiv(rows, launch.rows),)](
        x, branch, *vectors, total, normed, rows, per_image, width, EPS=eps, **_has(share, gamma, outer, following),
        ROWS=launch.rows, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return total, normed


@torch.library.custom_op(
    "pretrain::residual_norm_grad",
    mutates_args=(),
    schema="(Tensor grad_total, Tensor grad_normed, Tensor branch, Tensor total, Tensor? share, Tensor? gamma, "
    "Tensor? outer, Tensor? following, float eps) -> (Tensor, Tensor, Tensor)",
)
def residual_norm_grad(
    grad_total: Tensor,
    grad_normed: Tensor,
    branch: Tensor,
    total: Tensor,
    share: Tensor | None,
    gamma: Tensor | None,
    outer: Tensor | None,
    following: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the branch, and [vectors, c] in float32: of gamma, outer and following, one row or two
    for each that there is.
    """
    grad_total, grad_normed = grad_total.contiguous(), grad_normed.contiguous()
    branch, total = branch.contiguous(), total.contiguous()
    grad_x, grad_branch = torch.empty_like(grad_total), torch.empty_like(grad_total)
    rows, per_image, width = _row_counts(grad_total)
    launch = rows_launch(width, grad_total.element_size(), BACKWARD)
    tiles = triton.cdiv(rows, launch.rows)
    programs = _grad_programs(rows, tiles)
    num_vectors = sum(_VECTORS[name] for name, part in _named(gamma, outer, following) if part is not None)
    partial = grad_total.new_empty(programs, num_vectors, width, dtype=torch.float32)
    residual_norm_grad_kernel[(programs,)](
        grad_total, grad_normed, branch, total, *_or_dummy(grad_total, share, gamma, outer, following),
        grad_x, grad_branch, partial, rows, per_image, width, tiles, EPS=eps,
        **_has(share, gamma, outer, following), NUM_VECTORS=num_vectors,
        ROWS=launch.rows, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return grad_x, grad_branch, partial.sum(0)


def _row_counts(x: Tensor) -> tuple[int, int, int]:
    """Rows, rows of an image, numbers of a row."""
    width = x.shape[-1]
    return x.shape[:-1].numel(), x.shape[1:-1].numel(), width


def _grad_programs(rows: int, tiles: int) -> int:
    """Programs that share the rows of a gradient: each leaves partial sums as large as a row or more."""
    return max(1, min(tiles, GRAD_PROGRAMS, rows // ROWS_A_PROGRAM))


_VECTORS = {"gamma": 1, "outer": 2, "following": 2}  # rows of its gradient


def _named(
    gamma: Tensor | None, outer: Tensor | None, following: Tensor | None
) -> list[tuple[str, Tensor | None]]:
    return list(zip(_VECTORS, (gamma, outer, following), strict=True))


def _or_dummy(dummy: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Contiguous; `dummy` where there is none: a kernel does not touch it."""
    return [dummy if tensor is None else tensor.contiguous() for tensor in tensors]


def _has(
    share: Tensor | None, gamma: Tensor | None, outer: Tensor | None, following: Tensor | None
) -> dict[str, bool]:
    parts = {"SHARE": share, "GAMMA": gamma, "OUTER": outer, "FOLLOWING": following}
    return {f"HAS_{name}": part is not None for name, part in parts.items()}


@residual_norm.register_fake
def _(x, branch, share, gamma, outer, following, eps):
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total) if following is not None else x.new_empty(0)


@residual_norm_grad.register_fake
def _(grad_total, grad_normed, branch, total, share, gamma, outer, following, eps):
    grad = torch.empty_like(grad_total, memory_format=torch.contiguous_format)
    num_vectors = sum(_VECTORS[name] for name, part in _named(gamma, outer, following) if part is not None)
    return grad, torch.empty_like(grad), grad.new_empty(num_vectors, grad.shape[-1], dtype=torch.float32)


def _setup_residual(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, branch, share, gamma, outer, following, ctx.eps = inputs
    total = output[0]
    # What the kernel does not read is not kept: `total` stands in for it.
    is_read = gamma is not None or outer is not None
    ctx.save_for_backward(branch if is_read else total, total, share, gamma, outer, following)


def _residual_backward(ctx, grad_total: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    branch, total, share, gamma, outer, following = ctx.saved_tensors
    grad_x, grad_branch, of_vectors = residual_norm_grad(
        grad_total, grad_normed, branch, total, share, gamma, outer, following, ctx.eps
    )
    start, of_parts = 0, []
    for name, part in _named(gamma, outer, following):
        rows = of_vectors[start : start + _VECTORS[name]]
        of_parts.append(None if part is None else rows.view(part.shape).to(part.dtype))
        start += 0 if part is None else _VECTORS[name]
    return grad_x, grad_branch, None, *of_parts, None


residual_norm.register_autograd(_residual_backward, setup_context=_setup_residual)


@torch.library.custom_op(
    "pretrain::depthwise_norm_gelu",
    mutates_args=(),
    schema="(Tensor x, Tensor taps, Tensor bias, Tensor norm, float eps) -> Tensor",
)
def depthwise_norm_gelu(x: Tensor, taps: Tensor, bias: Tensor, norm: Tensor, eps: float) -> Tensor:
    """gelu(norm(convolution(x))) [n, h, w, c]. taps [size * size, c], bias [c], norm [2, c]: weight and bias.

    Two kernels: one alone would need every channel of a position, and issued twice the instructions.
    """
    x, norm = x.contiguous(), norm.contiguous()
    pre = _convolve(x, taps.contiguous(), bias)
    rows, _, width = _row_counts(x)
    launch = rows_launch(width, x.element_size(), FORWARD)
    out = torch.empty_like(x)
    norm_gelu_kernel[(triton.cdiv(rows, launch.rows),)](
        pre, norm, out, rows, width, EPS=eps,
        ROWS=launch.rows, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return out


@torch.library.custom_op(
    "pretrain::depthwise_norm_gelu_grad",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor x, Tensor taps, Tensor bias, Tensor norm, float eps) "
    "-> (Tensor, Tensor, Tensor)",
)
def depthwise_norm_gelu_grad(
    grad_out: Tensor, x: Tensor, taps: Tensor, bias: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the taps [size * size, c], and [3, c]: norm's weight and bias, convolution's bias.

    The convolution is computed again: nothing but x is kept. Gradients of parameters are float32.
    """
    grad_out, x, taps, norm = (tensor.contiguous() for tensor in (grad_out, x, taps, norm))
    pre = _convolve(x, taps, bias)
    rows, _, width = _row_counts(x)
    launch = rows_launch(width, grad_out.element_size(), BACKWARD)
    tiles = triton.cdiv(rows, launch.rows)
    of_vectors = x.new_empty(_grad_programs(rows, tiles), 3, width, dtype=torch.float32)
    grad_pre = torch.empty_like(x)
    norm_gelu_grad_kernel[(of_vectors.shape[0],)](
        grad_out, pre, norm, grad_pre, of_vectors, rows, width, tiles, EPS=eps,
        ROWS=launch.rows, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return _convolve(grad_pre, taps, None), _grad_taps(grad_pre, x, taps), of_vectors.sum(0)


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Depth-wise convolution; without bias its adjoint."""
    images, height, width, channels = x.shape
    out, launch = torch.empty_like(x), tile_launch(channels, x.element_size())
    runs = images * height * triton.cdiv(width, 4)
    depthwise_kernel[(triton.cdiv(runs, launch.runs), channels // launch.channels)](
        x, taps, taps if bias is None else bias.contiguous(), out, runs, height, width, channels,
        SIZE=_side(taps), IS_FLIPPED=bias is None,
        RUNS=launch.runs, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return out


def _grad_taps(grad_pre: Tensor, x: Tensor, taps: Tensor) -> Tensor:
    images, height, width, channels = x.shape
    launch, size = tile_launch(channels, x.element_size()), _side(taps)
    runs, parts = images * height * triton.cdiv(width, 4), channels // launch.channels
    tiles = triton.cdiv(runs, launch.runs)
    programs = min(tiles, triton.cdiv(TAP_PROGRAMS, parts * size))
    partial = x.new_empty(programs, size * size, channels, dtype=torch.float32)
    depthwise_grad_taps_kernel[(programs, parts, size)](
        grad_pre, x, partial, runs, height, width, channels, tiles, SIZE=size,
        RUNS=launch.runs, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return partial.sum(0)


def _side(taps: Tensor) -> int:
    return round(taps.shape[0] ** 0.5)


@depthwise_norm_gelu.register_fake
def _(x, taps, bias, norm, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@depthwise_norm_gelu_grad.register_fake
def _(grad_out, x, taps, bias, norm, eps):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return (
        grad_x,
        x.new_empty(taps.shape, dtype=torch.float32),
        x.new_empty(3, x.shape[3], dtype=torch.float32),
    )


def _setup_depthwise(ctx, inputs: tuple, output: Tensor) -> None:
    *kept, ctx.eps = inputs
    ctx.save_for_backward(*kept)


def _depthwise_backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, taps, bias, norm = ctx.saved_tensors
    grad_x, of_taps, of_vectors = depthwise_norm_gelu_grad(grad_out, x, taps, bias, norm, ctx.eps)
    return grad_x, of_taps.to(taps.dtype), of_vectors[2].to(bias.dtype), of_vectors[:2].to(norm.dtype), None


depthwise_norm_gelu.register_autograd(_depthwise_backward, setup_context=_setup_depthwise)


@torch.library.custom_op(
    "pretrain::gelu_grad",
    mutates_args=(),
    schema="(Tensor x, Tensor grad_out) -> (Tensor, Tensor)",
)
def gelu_grad(x: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x), and the gradient of x from that of gelu(x)."""
    x, grad_out = x.contiguous(), grad_out.contiguous()
    out, grad = torch.empty_like(x), torch.empty_like(x)
    gelu_grad_kernel[(triton.cdiv(x.numel(), NUMBERS),)](
        x, grad_out, out, grad, x.numel(), NUMBERS=NUMBERS, num_warps=4, **COMPILE_OPTIONS
    )
    return out, grad


@gelu_grad.register_fake
def _(x, grad_out):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)
