"""How do torch, autograd and torch.compile call the Triton kernels of DCNv3?

Three custom operators (forward, gradient of the packed rows, gradient of the value) with shapes for tracing
and autograd registered, so that torch.compile sees no graph break. Import this module only where Triton is
installed; the kernels also run on CPU tensors where TRITON_INTERPRET=1 is set before Triton is imported.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pretrain.kernels.dcnv3_launch import COMPILE_OPTIONS, Launch, Product, launch_for
from pretrain.kernels.triton_gather import grad_packed_kernel, sample_kernel
from pretrain.kernels.triton_scatter import grad_value_atomic_kernel, grad_value_kernel, reach_kernel

IS_INTERPRETED = not isinstance(sample_kernel, triton.runtime.JITFunction)


@torch.library.custom_op(
    "pretrain::dcnv3",
    mutates_args=(),
    schema="(Tensor value, Tensor packed, float offset_scale, bool has_scale, bool is_atomic) -> Tensor",
)
def fused_dcnv3(
    value: Tensor, packed: Tensor, offset_scale: float, has_scale: bool, is_atomic: bool
) -> Tensor:
    """Sampled value [n, h, w, c] of value [n, h, w, c] and packed rows [n, h, w, groups, 32].

    `has_scale`: the rows hold the logit of a centre scale. `is_atomic` chooses the gradient of the value:
    atomic sums in an order that changes from run to run, in place of the deterministic product.
    """
    value, packed = value.contiguous(), packed.contiguous()
    out = torch.empty_like(value)
    launch, shape = _launch(value, packed)
    positions = value.shape[0] * value.shape[1] * value.shape[2]
    sample_kernel[(triton.cdiv(positions, launch.sample.positions), packed.shape[3])](
        value, packed, out, positions, *shape, *_options(value, packed, offset_scale, has_scale),
        POSITIONS=launch.sample.positions, num_warps=launch.sample.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return out


@torch.library.custom_op(
    "pretrain::dcnv3_grad_packed",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor value, Tensor packed, float offset_scale, bool has_scale) -> Tensor",
)
def grad_packed(
    grad_out: Tensor, value: Tensor, packed: Tensor, offset_scale: float, has_scale: bool
) -> Tensor:
    """Gradient of the packed rows; zero in the columns that the forward pass does not read."""
    grad_out, value, packed = grad_out.contiguous(), value.contiguous(), packed.contiguous()
    grad = torch.empty_like(packed)
    launch, shape = _launch(value, packed)
    positions = value.shape[0] * value.shape[1] * value.shape[2]
    grad_packed_kernel[(triton.cdiv(positions, launch.grad_packed.positions), packed.shape[3])](
        grad_out, value, packed, grad, positions, *shape, *_options(value, packed, offset_scale, has_scale),
        POSITIONS=launch.grad_packed.positions, num_warps=launch.grad_packed.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return grad


@torch.library.custom_op(
    "pretrain::dcnv3_grad_value",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor packed, float offset_scale, bool has_scale, bool is_atomic) -> Tensor",
)
def grad_value(
    grad_out: Tensor, packed: Tensor, offset_scale: float, has_scale: bool, is_atomic: bool
) -> Tensor:
    """Gradient of the value, in the dtype of `grad_out`; sums in float32."""
    grad_out, packed = grad_out.contiguous(), packed.contiguous()
    launch, shape = _launch(grad_out, packed)
    options = _options(grad_out, packed, offset_scale, has_scale)
    if not is_atomic:
        return _grad_value_product(grad_out, packed, launch.grad_value, shape, options)
    grad = torch.zeros_like(grad_out, dtype=torch.float32)
    tile = launch.grad_value_atomic
    positions = grad_out.shape[0] * grad_out.shape[1] * grad_out.shape[2]
    grad_value_atomic_kernel[(triton.cdiv(positions, tile.positions), packed.shape[3])](
        grad_out, packed, grad, positions, *shape, *options,
        POSITIONS=tile.positions, num_warps=tile.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return grad.to(grad_out.dtype)


def _grad_value_product(
    grad_out: Tensor, packed: Tensor, product: Product, shape: tuple[int, int, int], options: tuple
) -> Tensor:
    images, (height, width, groups) = grad_out.shape[0], shape
    grad = torch.empty_like(grad_out)
    if product.is_banded:
        across = triton.cdiv(width, product.query_columns)
        num_tiles = triton.cdiv(height, product.query_rows) * across
        reach = grad_out.new_empty(images, groups, num_tiles, 4, dtype=torch.float32)
        reach_kernel[(num_tiles, groups, images)](
            packed, reach, *shape, across, OFFSET_SCALE=options[1],
            QUERY_ROWS=product.query_rows, QUERY_COLUMNS=product.query_columns, num_warps=1, **COMPILE_OPTIONS,
        )  # fmt: skip
    else:
        across, reach = 0, grad
        num_tiles = triton.cdiv(height * width, product.query_rows * product.query_columns)
    tiles = triton.cdiv(height, product.rows) * triton.cdiv(width, product.columns)
    grad_value_kernel[(tiles, groups, images)](
        grad_out, packed, reach, grad, *shape, num_tiles, across, *options,
        ROWS=product.rows, COLUMNS=product.columns,
        QUERY_ROWS=product.query_rows, QUERY_COLUMNS=product.query_columns,
        IS_BANDED=product.is_banded, PRECISION=dot_precision(grad_out.dtype),
        num_warps=product.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return grad


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 in three TF32 products on NVIDIA, exact to 1e-6, else as it is."""
    if IS_INTERPRETED:
        return "interpreted"
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def _launch(value: Tensor, packed: Tensor) -> tuple[Launch, tuple[int, int, int]]:
    """Launch parameters, and (height, width, groups) as the kernels take them."""
    shape = (value.shape[1], value.shape[2], packed.shape[3])
    return launch_for(*shape, value.shape[3] // shape[2], value.element_size()), shape


def _options(value: Tensor, packed: Tensor, offset_scale: float, has_scale: bool) -> tuple[int, float, bool]:
    """Group width, offset scale and whether there is a centre scale, as the kernels take them."""
    return value.shape[3] // packed.shape[3], offset_scale, has_scale


@fused_dcnv3.register_fake
def _(value: Tensor, packed: Tensor, offset_scale: float, has_scale: bool, is_atomic: bool) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@grad_packed.register_fake
def _(grad_out: Tensor, value: Tensor, packed: Tensor, offset_scale: float, has_scale: bool) -> Tensor:
    return torch.empty_like(packed, memory_format=torch.contiguous_format)


@grad_value.register_fake
def _(grad_out: Tensor, packed: Tensor, offset_scale: float, has_scale: bool, is_atomic: bool) -> Tensor:
    return torch.empty_like(grad_out, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    value, packed, ctx.offset_scale, ctx.has_scale, ctx.is_atomic = inputs
    ctx.save_for_backward(value, packed)


def _backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    value, packed = ctx.saved_tensors
    options = (ctx.offset_scale, ctx.has_scale)
    of_value = grad_value(grad_out, packed, *options, ctx.is_atomic) if ctx.needs_input_grad[0] else None
    of_packed = grad_packed(grad_out, value, packed, *options) if ctx.needs_input_grad[1] else None
    return of_value, of_packed, None, None, None


fused_dcnv3.register_autograd(_backward, setup_context=_setup_context)
