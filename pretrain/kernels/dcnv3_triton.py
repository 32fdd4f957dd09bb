"""How do torch, autograd and torch.compile call the Triton kernels of DCNv3?

Three custom operators (forward, gradient of the packed rows, gradient of the value) with shapes for tracing
and autograd registered, so that torch.compile sees no graph break. Import this module only where Triton is
installed; the kernels also run on CPU tensors where TRITON_INTERPRET=1 is set before Triton is imported.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pretrain.kernels.dcnv3_launch import COMPILE_OPTIONS, Launch, Product, ceil_div, launch_for
from pretrain.kernels.direct import differentiable, direct
from pretrain.kernels.packed_row import SCALE_LOGIT
from pretrain.kernels.triton_gather import grad_packed_kernel, sample_kernel
from pretrain.kernels.triton_scatter import arrange_kernel, grad_value_atomic_kernel, grad_value_kernel

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
    samples = packed.shape[:-1].numel()
    sample_kernel[(ceil_div(samples, launch.sample.samples),)](
        value, packed, out, samples, *shape, *_options(value, packed, offset_scale, has_scale),
        SAMPLES=launch.sample.samples, num_warps=launch.sample.warps, **COMPILE_OPTIONS,
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
    samples = packed.shape[:-1].numel()
    grad_packed_kernel[(ceil_div(samples, launch.grad_packed.samples),)](
        grad_out, value, packed, grad, samples, *shape, *_options(value, packed, offset_scale, has_scale),
        SAMPLES=launch.grad_packed.samples, num_warps=launch.grad_packed.warps, **COMPILE_OPTIONS,
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
    samples = packed.shape[:-1].numel()
    grad_value_atomic_kernel[(ceil_div(samples, tile.samples),)](
        grad_out, packed, grad, samples, *shape, *options,
        SAMPLES=tile.samples, num_warps=tile.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return grad.to(grad_out.dtype)


def _grad_value_product(
    grad_out: Tensor, packed: Tensor, product: Product, shape: tuple[int, int, int], options: tuple
) -> Tensor:
    images, (height, width, groups) = grad_out.shape[0], shape
    group_width, offset_scale, has_scale = options
    queries = {"QUERY_ROWS": product.query_rows, "QUERY_COLUMNS": product.query_columns}
    num_queries = product.query_rows * product.query_columns
    across, num_tiles = 0, ceil_div(height * width, num_queries)
    if product.is_banded:
        across = ceil_div(width, product.query_columns)
        num_tiles = ceil_div(height, product.query_rows) * across
    per_tile = (images, groups, num_tiles)
    arranged = grad_out.new_empty(*per_tile, SCALE_LOGIT, num_queries, dtype=torch.float32)
    reach = grad_out.new_empty(*per_tile, 4, dtype=torch.float32) if product.is_banded else arranged
    arrange_kernel[num_tiles, groups, images](
        packed, arranged, reach, *shape, across, OFFSET_SCALE=offset_scale, HAS_SCALE=has_scale, **queries,
        IS_BANDED=product.is_banded, num_warps=1, **COMPILE_OPTIONS,
    )  # fmt: skip
    grad = torch.empty_like(grad_out)
    tiles = ceil_div(height, product.rows) * ceil_div(width, product.columns)
    grad_value_kernel[tiles, groups, images](
        grad_out, packed, arranged, reach, grad, *shape, num_tiles, across,
        GROUP_WIDTH=group_width, HAS_SCALE=has_scale, ROWS=product.rows, COLUMNS=product.columns, **queries,
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


_call_grad_value, _call_grad_packed = direct(grad_value), direct(grad_packed)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    value, packed, ctx.offset_scale, ctx.has_scale, ctx.is_atomic = inputs
    ctx.save_for_backward(value, packed)


def _backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    value, packed = ctx.saved_tensors
    options = (ctx.offset_scale, ctx.has_scale)
    of_value = (
        _call_grad_value(grad_out, packed, *options, ctx.is_atomic) if ctx.needs_input_grad[0] else None
    )
    of_packed = _call_grad_packed(grad_out, value, packed, *options) if ctx.needs_input_grad[1] else None
    return of_value, of_packed, None, None, None


call_fused_dcnv3 = differentiable(fused_dcnv3, _setup_context, _backward)
