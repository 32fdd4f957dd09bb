"""How do torch, autograd and torch.compile call the kernel that joins a branch to its map and normalises both?

Custom operators with shapes for tracing and autograd registered; as dcnv3_triton.py otherwise.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pretrain.kernels.dcnv3_launch import COMPILE_OPTIONS
from pretrain.kernels.pointwise_launch import BACKWARD, FORWARD, grad_programs, row_counts, rows_launch
from pretrain.kernels.triton_residual import residual_norm_grad_kernel, residual_norm_kernel


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
    rows, per_image, width = row_counts(x)
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
    rows, per_image, width = row_counts(grad_total)
    launch = rows_launch(width, grad_total.element_size(), BACKWARD)
    tiles = triton.cdiv(rows, launch.rows)
    programs = grad_programs(rows, tiles)
    num_vectors = sum(_VECTORS[name] for name, part in _named(gamma, outer, following) if part is not None)
    partial = grad_total.new_empty(programs, num_vectors, width, dtype=torch.float32)
    residual_norm_grad_kernel[(programs,)](
        grad_total, grad_normed, branch, total, *_or_dummy(grad_total, share, gamma, outer, following),
        grad_x, grad_branch, partial, rows, per_image, width, tiles, EPS=eps,
        **_has(share, gamma, outer, following), NUM_VECTORS=num_vectors,
        ROWS=launch.rows, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return grad_x, grad_branch, partial.sum(0)


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
