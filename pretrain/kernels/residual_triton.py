"""How do torch, autograd and torch.compile call the kernel that joins a branch to its map and normalises both?

Custom operators with shapes for tracing and autograd registered, and what calls them (direct.py); as
dcnv3_triton.py otherwise. A LayerNorm alone is the same kernel without a branch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.kernels.dcnv3_launch import COMPILE_OPTIONS, ceil_div
from pretrain.kernels.direct import differentiable, direct
from pretrain.kernels.pointwise_launch import grad_programs, row_counts, rows_launch
from pretrain.kernels.triton_residual import residual_norm_grad_kernel, residual_norm_kernel


@torch.library.custom_op(
    "pretrain::residual_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor? share, Tensor? gamma, Tensor? outer, Tensor? following, "
    "float eps) -> (Tensor, Tensor, Tensor)",
)
def residual_norm(
    x: Tensor,
    branch: Tensor,
    share: Tensor | None,
    gamma: Tensor | None,
    outer: Tensor | None,
    following: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + share gamma norm(branch) [n, h, w, c], its norm, and the mean and scale of every row in float32, [2, n h w]
    for each of the two norms that there is. Without `following` the second is empty.
    """
    x, branch = x.contiguous(), branch.contiguous()
    total = torch.empty_like(x)
    normed = torch.empty_like(x) if following is not None else x.new_empty(0)
    statistics = x.new_empty(_statistics(x, outer, following), dtype=torch.float32)
    _forward(x, branch, total, normed, statistics, (share, gamma, outer, following), eps)
    return total, normed, statistics


@torch.library.custom_op(
    "pretrain::layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor norm, float eps) -> (Tensor, Tensor)",
)
def layer_norm(x: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm of x [..., c] by norm [2, c], weight and bias; and mean and scale of every row, [2, rows]."""
    x = x.contiguous()
    normed = torch.empty_like(x)
    statistics = x.new_empty(_statistics(x, norm), dtype=torch.float32)
    _forward(x, None, x, normed, statistics, (None, None, None, norm), eps)
    return normed, statistics


def _forward(
    x: Tensor,
    branch: Tensor | None,
    total: Tensor,
    normed: Tensor,
    statistics: Tensor,
    parts: tuple[Tensor | None, ...],
    eps: float,
) -> None:
    rows, per_image, width = row_counts(x)
    launch = rows_launch(width, x.element_size())
    residual_norm_kernel[(ceil_div(rows, launch.rows),)](
        x, *_or_dummy(x, branch, *parts), total, normed, statistics, rows, per_image, width,
        EPS=eps, **_has(branch, *parts),
        ROWS=launch.rows, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip


@torch.library.custom_op(
    "pretrain::residual_norm_grad",
    mutates_args=(),
    schema="(Tensor? grad_total, Tensor? grad_normed, Tensor? branch, Tensor total, Tensor statistics, "
    "Tensor? share, Tensor? gamma, Tensor? outer, Tensor? following) -> (Tensor, Tensor, Tensor)",
)
def residual_norm_grad(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    branch: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    share: Tensor | None,
    gamma: Tensor | None,
    outer: Tensor | None,
    following: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the branch, and [vectors, c] in float32: of gamma, outer and following, one row or two
    for each that there is. That of x is empty without `following`, where it is that of the total; that of the
    branch is empty without `grad_total`, for a LayerNorm alone.
    """
    total = total.contiguous()
    rows, per_image, width = row_counts(total)
    launch = rows_launch(width, total.element_size())
    tiles = ceil_div(rows, launch.rows)
    programs = grad_programs(rows, tiles)
    parts = (share, gamma, outer, following)
    grad_x, grad_branch, of_vectors = _gradients(grad_total, total, gamma, outer, following)
    partial = total.new_empty(programs, *of_vectors, dtype=torch.float32)
    residual_norm_grad_kernel[(programs,)](
        *_or_dummy(total, grad_total, grad_normed, branch), total, *_or_dummy(total, *parts), statistics,
        grad_x, grad_branch, partial, rows, per_image, width, tiles, **_has(grad_total, *parts),
        NUM_VECTORS=of_vectors[0],
        ROWS=launch.rows, CHANNELS=launch.channels, num_warps=launch.warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    return grad_x, grad_branch, partial.sum(0)


_VECTORS = {"gamma": 1, "outer": 2, "following": 2}  # rows of its gradient


def _named(
    gamma: Tensor | None, outer: Tensor | None, following: Tensor | None
) -> list[tuple[str, Tensor | None]]:
    return list(zip(_VECTORS, (gamma, outer, following), strict=True))


def _gradients(
    grad_total: Tensor | None,
    total: Tensor,
    gamma: Tensor | None,
    outer: Tensor | None,
    following: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Room for the gradients of x and branch, and shape of that of the vectors."""
    named = _named(gamma, outer, following)
    num_vectors = sum(_VECTORS[name] for name, part in named if part is not None)
    like = torch.empty_like(total, memory_format=torch.contiguous_format)
    return (
        like if following is not None else total.new_empty(0),
        total.new_empty(0) if grad_total is None else torch.empty_like(like),
        (num_vectors, total.shape[-1]),
    )


def _statistics(x: Tensor, *norms: Tensor | None) -> tuple[int, int]:
    return 2 * sum(norm is not None for norm in norms), x.shape[:-1].numel()


def _or_dummy(dummy: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Contiguous; `dummy` where there is none: a kernel does not touch it."""
    return [dummy if tensor is None else tensor.contiguous() for tensor in tensors]


def _has(
    branch: Tensor | None,
    share: Tensor | None,
    gamma: Tensor | None,
    outer: Tensor | None,
    following: Tensor | None,
) -> dict[str, bool]:
    parts = {"BRANCH": branch, "SHARE": share, "GAMMA": gamma, "OUTER": outer, "FOLLOWING": following}
    return {f"HAS_{name}": part is not None for name, part in parts.items()}


@residual_norm.register_fake
def _(x, branch, share, gamma, outer, following, eps):
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = torch.empty_like(total) if following is not None else x.new_empty(0)
    return total, normed, x.new_empty(_statistics(x, outer, following), dtype=torch.float32)


@layer_norm.register_fake
def _(x, norm, eps):
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    return normed, x.new_empty(_statistics(x, norm), dtype=torch.float32)


@residual_norm_grad.register_fake
def _(grad_total, grad_normed, branch, total, statistics, share, gamma, outer, following):
    grad_x, grad_branch, of_vectors = _gradients(grad_total, total, gamma, outer, following)
    return grad_x, grad_branch, total.new_empty(of_vectors, dtype=torch.float32)


_call_grad = direct(residual_norm_grad)


def _setup_residual(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, branch, share, gamma, outer, following, _ = inputs
    total, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    # What the kernel does not read is not kept: `total` stands in for it.
    is_read = gamma is not None or outer is not None
    ctx.save_for_backward(branch if is_read else total, total, statistics, share, gamma, outer, following)


def _residual_backward(ctx, grad_total: Tensor, grad_normed: Tensor, _: None) -> tuple[Tensor | None, ...]:
    branch, total, statistics, share, gamma, outer, following = ctx.saved_tensors
    grad_x, grad_branch, of_vectors = _call_grad(
        grad_total, grad_normed, branch, total, statistics, share, gamma, outer, following
    )
    start, of_parts = 0, []
    for name, part in _named(gamma, outer, following):
        rows = of_vectors[start : start + _VECTORS[name]]
        of_parts.append(None if part is None else rows.view(part.shape).to(part.dtype))
        start += 0 if part is None else _VECTORS[name]
    return grad_x if following is not None else grad_total, grad_branch, None, *of_parts, None


call_residual_norm = differentiable(residual_norm, _setup_residual, _residual_backward)


def _setup_norm(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, norm, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, norm, output[1])


def _norm_backward(ctx, grad_normed: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, norm, statistics = ctx.saved_tensors
    grad_x, _, of_norm = _call_grad(None, grad_normed, None, x, statistics, None, None, None, norm)
    return grad_x, of_norm.to(norm.dtype), None


call_layer_norm = differentiable(layer_norm, _setup_norm, _norm_backward)
