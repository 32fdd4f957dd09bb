"""How is DCNv3 sampled fast in plain torch, without keeping what it gathers?

Sampling is a product with a sparse matrix S: one row for every (position, group), p points x 4 corners in
it. So out = S X is an embedding bag (gather and weighted sum in one), the gradient of the weights is dOut X'
at the entries of S (a sampled dense product), and dX = S' dOut is again an embedding bag, over the points
sorted by the cell they fall into. The four corners share one index: each sees the table from another start.
A border of zeros stands in for every test of "outside". Nothing is scattered, so results are deterministic.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Corners = tuple[Tensor, Tensor, Tensor, Tensor]  # upper left, upper right, lower left, lower right


def sample_sparse(
    value: Float[Tensor, "n h w c"],
    x: Float[Tensor, "n ho wo g p"],
    y: Float[Tensor, "n ho wo g p"],
    mask: Float[Tensor, "n ho wo g p"],
) -> Float[Tensor, "n ho wo c"]:
    """Mask-weighted sum of the bilinear samples at pixels (x, y); all of one dtype, float32 or float64.

    Keeps its four inputs for the backward pass, nothing else; differentiable once. A location that is infinite
    counts as far outside, as in the published operator; NaN stays NaN.
    """
    return _sample(value, x, y, mask)


# Operators of torch.library: torch.compile takes each as one step, without looking inside, on any device.
@torch.library.custom_op(
    "pretrain::dcnv3_sparse",
    mutates_args=(),
    schema="(Tensor value, Tensor x, Tensor y, Tensor mask) -> Tensor",
)
def _sample(value: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    cell, share_x, share_y = _cells(x, y, value.shape)
    index = cell.view(-1, cell.shape[-1])
    table = _padded_rows(value, x.shape[3])
    out = None
    for step, weight in zip(_steps(value.shape, x.shape[3]), _weights(share_x, share_y, mask), strict=True):
        part = F.embedding_bag(index, table[step:], per_sample_weights=weight.view(index.shape), mode="sum")
        out = part if out is None else out.add_(part)
    return out.view(*x.shape[:3], value.shape[3])


@torch.library.custom_op(
    "pretrain::dcnv3_sparse_grad",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor value, Tensor x, Tensor y, Tensor mask, bool of_value, bool of_weights) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _sample_grad(
    grad_out: Tensor, value: Tensor, x: Tensor, y: Tensor, mask: Tensor, of_value: bool, of_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, x, y and mask; empty where they are not asked for."""
    rows = grad_out.reshape(mask.numel() // mask.shape[-1], -1)
    cell, share_x, share_y = _cells(x, y, value.shape)
    grad_value, grad_x, grad_y, grad_mask = (value.new_empty(0) for _ in range(4))
    if of_value:
        grad_value = _grad_value(rows, cell, _weights(share_x, share_y, mask), value.shape).contiguous()
    if of_weights:
        upper_left, upper_right, lower_left, lower_right = _products(rows, value, cell)
        slope_upper, slope_lower = upper_right.sub_(upper_left), lower_right.sub_(lower_left)
        upper = torch.addcmul(upper_left, share_x, slope_upper)
        slope_y = torch.addcmul(lower_left, share_x, slope_lower).sub_(upper)
        grad_mask = torch.addcmul(upper, share_y, slope_y)
        slope_x = torch.lerp(slope_upper, slope_lower, share_y)
        grad_x = slope_x.mul_(mask).mul_((x >= -1) & (x < value.shape[2]))
        grad_y = slope_y.mul_(mask).mul_((y >= -1) & (y < value.shape[1]))
    return grad_value, grad_x, grad_y, grad_mask


@_sample.register_fake
def _(value, x, y, mask):
    return value.new_empty(*x.shape[:3], value.shape[3])


@_sample_grad.register_fake
def _(grad_out, value, x, y, mask, of_value, of_weights):
    of_weights_shape = mask.shape if of_weights else (0,)
    return (
        value.new_empty(value.shape if of_value else (0,)),
        *(mask.new_empty(of_weights_shape) for _ in range(3)),
    )


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    gradients = _sample_grad(grad_out, *ctx.saved_tensors, needs[0], any(needs[1:]))
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


_sample.register_autograd(_backward, setup_context=_setup)


def _padded_rows(value: Float[Tensor, "n h w c"], groups: int) -> Float[Tensor, "cells d"]:
    """The table that is sampled: one row for every (image, row, column, group) of the zero-bordered map."""
    return F.pad(value, (0, 0, 1, 1, 1, 1)).view(-1, value.shape[3] // groups)


def _steps(shape: torch.Size, groups: int) -> tuple[int, int, int, int]:
    """Table rows from a cell's upper left corner to each of its corners."""
    return 0, groups, (shape[2] + 2) * groups, (shape[2] + 3) * groups


def _cells(
    x: Float[Tensor, "n ho wo g p"], y: Float[Tensor, "n ho wo g p"], shape: torch.Size
) -> tuple[Int[Tensor, "n ho wo g p"], Float[Tensor, "n ho wo g p"], Float[Tensor, "n ho wo g p"]]:
    """Table row of each sample's upper left corner; shares of the right and of the lower corners, in [0, 1].

    Beyond the border the cell is the last one and the share 0 or 1, so that all weight falls on zeros.
    """
    n, height, width, _ = shape
    groups, pitch = x.shape[3], width + 2
    left = x.floor().clamp_(-1, width - 1)
    top = y.floor().clamp_(-1, height - 1)
    cell = torch.add(left, top, alpha=pitch).to(torch.int32)
    cell = cell.clamp_(-pitch - 1, pitch * height).mul_(groups)  # NaN stays in bounds; its share tells
    image = torch.arange(n, dtype=torch.int32, device=x.device) * ((height + 2) * pitch * groups)
    group = torch.arange(groups, dtype=torch.int32, device=x.device) + (pitch + 1) * groups
    cell += image.view(n, 1, 1, 1, 1) + group[:, None]
    return cell, torch.sub(x, left, out=left).clamp_(0, 1), torch.sub(y, top, out=top).clamp_(0, 1)


def _weights(
    share_x: Float[Tensor, "n ho wo g p"],
    share_y: Float[Tensor, "n ho wo g p"],
    mask: Float[Tensor, "n ho wo g p"],
) -> Corners:
    right = mask * share_x
    left = mask - right
    lower_right, lower_left = right * share_y, left * share_y
    return left.sub_(lower_left), right.sub_(lower_right), lower_left, lower_right


def _grad_value(
    rows: Float[Tensor, "r d"], cell: Int[Tensor, "n ho wo g p"], weights: Corners, shape: torch.Size
) -> Float[Tensor, "n h w c"]:
    """dX = S' dOut: one bag for every cell and corner; a corner's bags are added where the corner lies."""
    n, height, width, channels = shape
    groups = cell.shape[3]
    num_cells = n * (height + 2) * (width + 2) * groups
    cells, order = cell.view(-1).sort(stable=True)
    counts = torch.bincount(cells, minlength=num_cells)
    starts = counts.cumsum(0).sub_(counts)
    source = order.div(cell.shape[-1], rounding_mode="floor")
    grad = torch.zeros(num_cells, rows.shape[1], dtype=rows.dtype, device=rows.device)
    for step, weight in zip(_steps(shape, groups), weights, strict=True):
        share = weight.view(-1).index_select(0, order)
        bags = F.embedding_bag(source, rows, starts, per_sample_weights=share, mode="sum")
        grad[step:] += bags[: num_cells - step]
    return grad.view(n, height + 2, width + 2, channels)[:, 1:-1, 1:-1]


def _products(
    rows: Float[Tensor, "r d"], value: Float[Tensor, "n h w c"], cell: Int[Tensor, "n ho wo g p"]
) -> Corners:
    """<dOut, corner> for every point and corner: what all gradients of locations and masks are made of."""
    groups, points = cell.shape[3:]
    table = _padded_rows(value, groups)
    dot = _dot_sampled if rows.device.type == "cpu" else _dot_gathered
    index = cell.view(-1, points)
    return tuple(dot(rows, table[step:], index).view(cell.shape) for step in _steps(value.shape, groups))


def _dot_sampled(
    rows: Float[Tensor, "r d"], table: Float[Tensor, "t d"], index: Int[Tensor, "r p"]
) -> Float[Tensor, "r p"]:
    """<rows[i], table[index[i, j]]>, without gathering: a dense product sampled at a sparse pattern."""
    _silence_sparse_notice()
    starts = torch.arange(0, index.numel() + 1, index.shape[1], dtype=index.dtype, device=index.device)
    zeros = torch.zeros(index.numel(), dtype=rows.dtype, device=index.device)
    size = (rows.shape[0], table.shape[0])
    pattern = torch.sparse_csr_tensor(starts, index.reshape(-1), zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, rows, table.t(), beta=0.0).values().view(index.shape)


def _dot_gathered(
    rows: Float[Tensor, "r d"], table: Float[Tensor, "t d"], index: Int[Tensor, "r p"]
) -> Float[Tensor, "r p"]:
    """<rows[i], table[index[i, j]]> by gathering, for devices whose sampled product wants sorted columns."""
    return torch.bmm(table[index.long()], rows[:, :, None])[..., 0]


@cache
def _silence_sparse_notice() -> None:
    """Torch announces once a process that its sparse layout is in beta and, in 2.11, that it is not checked; we
    use one kernel of it, tested, and say check_invariants=False.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        empty = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(empty, empty[:0], torch.zeros(0), (0, 1), check_invariants=False)
