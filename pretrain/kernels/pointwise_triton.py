"""How do torch, autograd and torch.compile call the kernels of the depth-wise step and of GELU?

Custom operators with shapes for tracing and autograd registered; as dcnv3_triton.py otherwise.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pretrain.kernels.dcnv3_launch import COMPILE_OPTIONS
from pretrain.kernels.pointwise_launch import (
    BACKWARD,
    FORWARD,
    NUMBERS,
    TAP_PROGRAMS,
    grad_programs,
    row_counts,
    rows_launch,
    tile_launch,
)
from pretrain.kernels.triton_depthwise import depthwise_grad_taps_kernel, depthwise_kernel
from pretrain.kernels.triton_gelu import gelu_grad_kernel
from pretrain.kernels.triton_norm import norm_gelu_grad_kernel, norm_gelu_kernel


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
    rows, _, width = row_counts(x)
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
    rows, _, width = row_counts(x)
    launch = rows_launch(width, grad_out.element_size(), BACKWARD)
    tiles = triton.cdiv(rows, launch.rows)
    of_vectors = x.new_empty(grad_programs(rows, tiles), 3, width, dtype=torch.float32)
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
