"""How do torch, autograd and torch.compile call the kernels of the depth-wise step and of GELU?

Custom operators with shapes for tracing and autograd registered; as dcnv3_triton.py otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.kernels.dcnv3_launch import COMPILE_OPTIONS, ceil_div
from pretrain.kernels.direct import differentiable, direct
from pretrain.kernels.pointwise_launch import (
    CONVOLUTION_WARPS,
    NUMBERS,
    TAP_PROGRAMS,
    TAP_WARPS,
    grad_programs,
    row_counts,
    rows_launch,
    sum_launch,
    tile_launch,
)
from pretrain.kernels.triton_column_sum import column_sum_kernel
from pretrain.kernels.triton_depthwise import depthwise_grad_taps_kernel, depthwise_kernel
from pretrain.kernels.triton_gelu import gelu_grad_kernel
from pretrain.kernels.triton_norm import norm_gelu_grad_kernel, norm_gelu_kernel


@torch.library.custom_op(
    "pretrain::depthwise_norm_gelu",
    mutates_args=(),
    schema="(Tensor x, Tensor taps, Tensor bias, Tensor norm, float eps) -> (Tensor, Tensor)",
)
def depthwise_norm_gelu(
    x: Tensor, taps: Tensor, bias: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """gelu(norm(convolution(x))) [n, h, w, c], and the norm's mean and scale of every row, [2, n h w], float32.

    taps [size * size, c], bias [c], norm [2, c]: weight and bias. Two kernels: one alone would need every channel of
    a position, and issued twice the instructions.
    """
    x, norm = x.contiguous(), norm.contiguous()
    pre = _convolve(x, taps.contiguous(), bias)
    rows, _, width = row_counts(x)
    launch = rows_launch(width, x.element_size())
    out, statistics = torch.empty_like(x), x.new_empty(2, rows, dtype=torch.float32)
    norm_gelu_kernel[(ceil_div(rows, launch.rows),)](
        pre, norm, out, statistics, rows, width, EPS=eps,
        ROWS=launch.rows, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return out, statistics


@torch.library.custom_op(
    "pretrain::depthwise_norm_gelu_grad",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor x, Tensor taps, Tensor bias, Tensor norm, Tensor statistics) "
    "-> (Tensor, Tensor, Tensor)",
)
def depthwise_norm_gelu_grad(
    grad_out: Tensor, x: Tensor, taps: Tensor, bias: Tensor, norm: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the taps [size * size, c], and [3, c]: norm's weight and bias, convolution's bias.

    The convolution is computed again: nothing but x and the statistics is kept. Gradients of parameters are float32.
    """
    grad_out, x, taps, norm = (tensor.contiguous() for tensor in (grad_out, x, taps, norm))
    pre = _convolve(x, taps, bias)
    rows, _, width = row_counts(x)
    launch = rows_launch(width, grad_out.element_size())
    tiles = ceil_div(rows, launch.rows)
    of_vectors = x.new_empty(grad_programs(rows, tiles), 3, width, dtype=torch.float32)
    grad_pre = torch.empty_like(x)
    norm_gelu_grad_kernel[(of_vectors.shape[0],)](
        grad_out, pre, norm, statistics, grad_pre, of_vectors, rows, width, tiles,
        ROWS=launch.rows, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return _convolve(grad_pre, taps, None), _grad_taps(grad_pre, x, taps), of_vectors.sum(0)


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Depth-wise convolution; without bias its adjoint."""
    images, height, width, channels = x.shape
    out = torch.empty_like(x)
    launch = tile_launch(channels, x.element_size(), CONVOLUTION_WARPS)
    runs = images * height * ceil_div(width, 4)
    depthwise_kernel[(ceil_div(runs, launch.runs), channels // launch.channels)](
        x, taps, taps if bias is None else bias.contiguous(), out, runs, height, width, channels,
        SIZE=_side(taps), IS_FLIPPED=bias is None,
        RUNS=launch.runs, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return out


def _grad_taps(grad_pre: Tensor, x: Tensor, taps: Tensor) -> Tensor:
    images, height, width, channels = x.shape
    launch, size = tile_launch(channels, x.element_size(), TAP_WARPS), _side(taps)
    runs, parts = images * height * ceil_div(width, 4), channels // launch.channels
    tiles = ceil_div(runs, launch.runs)
    programs = min(tiles, ceil_div(TAP_PROGRAMS, parts * size))
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
    statistics = x.new_empty(2, x.shape[:-1].numel(), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), statistics


@depthwise_norm_gelu_grad.register_fake
def _(grad_out, x, taps, bias, norm, statistics):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return (
        grad_x,
        x.new_empty(taps.shape, dtype=torch.float32),
        x.new_empty(3, x.shape[3], dtype=torch.float32),
    )


_call_depthwise_grad = direct(depthwise_norm_gelu_grad)


def _setup_depthwise(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *kept, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*kept, output[1])


def _depthwise_backward(ctx, grad_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, taps, bias, norm, statistics = ctx.saved_tensors
    grad_x, of_taps, of_vectors = _call_depthwise_grad(grad_out, x, taps, bias, norm, statistics)
    return grad_x, of_taps.to(taps.dtype), of_vectors[2].to(bias.dtype), of_vectors[:2].to(norm.dtype), None


call_depthwise_norm_gelu = differentiable(depthwise_norm_gelu, _setup_depthwise, _depthwise_backward)


@torch.library.custom_op(
    "pretrain::gelu_grad",
    mutates_args=(),
    schema="(Tensor x, Tensor grad_out) -> (Tensor, Tensor)",
)
def gelu_grad(x: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x), and the gradient of x from that of gelu(x)."""
    x, grad_out = x.contiguous(), grad_out.contiguous()
    out, grad = torch.empty_like(x), torch.empty_like(x)
    gelu_grad_kernel[(ceil_div(x.numel(), NUMBERS),)](
        x, grad_out, out, grad, x.numel(), NUMBERS=NUMBERS, num_warps=4, **COMPILE_OPTIONS
    )
    return out, grad


@gelu_grad.register_fake
def _(x, grad_out):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out)


@torch.library.custom_op("pretrain::column_sum", mutates_args=(), schema="(Tensor x) -> Tensor")
def column_sum(x: Tensor) -> Tensor:
    """Sum over the rows of x [rows, width], in float32; always in the same order."""
    x = x.contiguous()
    rows, width = x.shape
    launch = sum_launch(rows, width, x.element_size())
    partial = x.new_empty(launch.programs, width, dtype=torch.float32)
    column_sum_kernel[launch.programs, ceil_div(width, launch.channels)](
        x, partial, rows, width, ceil_div(rows, launch.programs * launch.rows) * launch.rows,
        ROWS=launch.rows, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return partial.sum(0)


@column_sum.register_fake
def _(x):
    return x.new_empty(x.shape[1], dtype=torch.float32)


call_gelu_grad, call_column_sum = direct(gelu_grad), direct(column_sum)
