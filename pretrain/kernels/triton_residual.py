"""How do Triton programs add a branch to a map and normalise it, before and after, in one reading?

A program owns whole rows of channels, so that both norms are sums within it. Sums are float32. For the gradient
the mean and scale of every row are kept beside inputs and output.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from pretrain.kernels.triton_norm import (
    standardise,
    standardise_again,
    standardise_grad,
    vector,
)


@triton.jit
@no_type_check
def residual_norm_kernel(
    x_pointer,  # [rows, width]
    branch_pointer,  # [rows, width]
    share_pointer,  # [images]: 0, or 1 / keep
    gamma_pointer,  # [width]
    outer_pointer,  # [2, width]: weight and bias of the branch's norm
    following_pointer,  # [2, width]: of the sum's norm
    total_pointer,  # [rows, width]
    normed_pointer,  # [rows, width]
    statistics_pointer,  # [2 norms, rows], float32: mean and scale, of the branch's norm before the sum's
    num_rows,
    rows_per_image,
    width,
    EPS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,  # False: total is x, and not written
    HAS_SHARE: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_FOLLOWING: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,  # power of 2 that holds a row
):
    """total = x + share gamma norm(branch), normed = norm(total); each part only where HAS_ says so."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    is_channel = channel < width
    is_valid = (row < num_rows) & is_channel
    place = row.to(tl.int64) * width + channel
    total = tl.load(x_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(branch_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
        if HAS_OUTER:
            branch = standardise(branch, statistics_pointer, 0, row, num_rows, is_channel, width, EPS)
            branch *= vector(outer_pointer, 0, channel, is_channel, width)
            branch += vector(outer_pointer, 1, channel, is_channel, width)
        if HAS_GAMMA:
            branch *= vector(gamma_pointer, 0, channel, is_channel, width)
        if HAS_SHARE:
            branch *= tl.load(share_pointer + row // rows_per_image, mask=row < num_rows, other=0.0).to(
                tl.float32
            )
        rounded = (total + branch).to(total_pointer.dtype.element_ty)
        tl.store(total_pointer + place, rounded, mask=is_valid)
        total = rounded.to(tl.float32)
    if HAS_FOLLOWING:
        number: tl.constexpr = 1 if HAS_OUTER else 0
        normed = standardise(total, statistics_pointer, number, row, num_rows, is_channel, width, EPS)
        normed *= vector(following_pointer, 0, channel, is_channel, width)
        normed += vector(following_pointer, 1, channel, is_channel, width)
        tl.store(normed_pointer + place, normed.to(normed_pointer.dtype.element_ty), mask=is_valid)


@triton.jit
@no_type_check
def residual_norm_grad_kernel(
    grad_total_pointer,  # [rows, width]
    grad_normed_pointer,  # [rows, width]
    branch_pointer,  # [rows, width]
    total_pointer,  # [rows, width]
    share_pointer,  # [images]
    gamma_pointer,  # [width]
    outer_pointer,  # [2, width]
    following_pointer,  # [2, width]
    statistics_pointer,  # [2 norms, rows]
    grad_x_pointer,  # [rows, width]; written where HAS_FOLLOWING: it is that of total elsewhere
    grad_branch_pointer,  # [rows, width]
    partial_pointer,  # [programs, vectors, width], float32: of gamma, outer and following, where they are
    num_rows,
    rows_per_image,
    width,
    num_tiles,
    HAS_BRANCH: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_FOLLOWING: tl.constexpr,
    NUM_VECTORS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of x and branch, and each program's share of those of the parameters."""
    channel = tl.arange(0, CHANNELS)[None, :]
    is_channel = channel < width
    of_gamma = tl.zeros([ROWS, CHANNELS], tl.float32)
    of_outer_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
    of_outer_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    of_following_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
    of_following_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    tile = tl.program_id(0)
    while tile < num_tiles:
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        is_valid = (row < num_rows) & is_channel
        place = row.to(tl.int64) * width + channel
        if HAS_BRANCH:
            grad = tl.load(grad_total_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
        else:
            grad = tl.zeros([ROWS, CHANNELS], tl.float32)
        if HAS_FOLLOWING:
            total = tl.load(total_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
            standard, scale = standardise_again(
                total, statistics_pointer, 1 if HAS_OUTER else 0, row, num_rows, is_channel
            )
            grad_normed = tl.load(grad_normed_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
            of_following_weight += grad_normed * standard
            of_following_bias += grad_normed
            grad_normed *= vector(following_pointer, 0, channel, is_channel, width)
            grad += standardise_grad(grad_normed, standard, scale, is_channel, width)
            tl.store(grad_x_pointer + place, grad.to(grad_x_pointer.dtype.element_ty), mask=is_valid)
        if HAS_SHARE:
            grad *= tl.load(share_pointer + row // rows_per_image, mask=row < num_rows, other=0.0).to(
                tl.float32
            )
        if HAS_OUTER:
            branch = tl.load(branch_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
            standard, scale = standardise_again(branch, statistics_pointer, 0, row, num_rows, is_channel)
            weight = vector(outer_pointer, 0, channel, is_channel, width)
            if HAS_GAMMA:
                bias = vector(outer_pointer, 1, channel, is_channel, width)
                of_gamma += grad * (standard * weight + bias)
                grad *= vector(gamma_pointer, 0, channel, is_channel, width)
            of_outer_weight += grad * standard
            of_outer_bias += grad
            grad = standardise_grad(grad * weight, standard, scale, is_channel, width)
        elif HAS_GAMMA:
            branch = tl.load(branch_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
            of_gamma += grad * branch
            grad *= vector(gamma_pointer, 0, channel, is_channel, width)
        if HAS_BRANCH:
            tl.store(
                grad_branch_pointer + place, grad.to(grad_branch_pointer.dtype.element_ty), mask=is_valid
            )
        tile += tl.num_programs(0)
    # Rows of the partial sums, one after the other, of the parameters that there are.
    place = partial_pointer + tl.program_id(0).to(tl.int64) * (NUM_VECTORS * width) + tl.arange(0, CHANNELS)
    is_channel = tl.arange(0, CHANNELS) < width
    if HAS_GAMMA:
        tl.store(place, tl.sum(of_gamma, 0), mask=is_channel)
        place += width
    if HAS_OUTER:
        tl.store(place, tl.sum(of_outer_weight, 0), mask=is_channel)
        tl.store(place + width, tl.sum(of_outer_bias, 0), mask=is_channel)
        place += 2 * width
    if HAS_FOLLOWING:
        tl.store(place, tl.sum(of_following_weight, 0), mask=is_channel)
        tl.store(place + width, tl.sum(of_following_bias, 0), mask=is_channel)
