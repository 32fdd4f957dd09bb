"""How do Triton programs normalise rows of channels, alone and before a GELU?

A program owns whole rows, so that mean and deviation are sums within it, in float32. They are kept for the
gradient, two numbers a row, which then needs one sum over a row, of two numbers at a time.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from pretrain.kernels.triton_gelu import gelu, gelu_slope


@triton.jit
@no_type_check
def row_sum(tile):
    return tl.sum(tile, 1)[:, None]


@triton.jit
@no_type_check
def standardise(
    tile, statistics_pointer, number: tl.constexpr, row, num_rows, is_channel, width, EPS: tl.constexpr
):
    """Rows of `tile` with mean 0 and variance 1 (0 outside the channels). Their mean and what multiplied them go to
    the lines 2 `number` and 2 `number` + 1 of statistics [_, rows].
    """
    place = statistics_pointer + 2 * number * num_rows + row
    mean = row_sum(tile) / width
    tl.store(place, mean, mask=row < num_rows)
    centred = tl.where(is_channel, tile - mean, 0.0)
    scale = tl.rsqrt(row_sum(centred * centred) / width + EPS)
    tl.store(place + num_rows, scale, mask=row < num_rows)
    return centred * scale


@triton.jit
@no_type_check
def standardise_again(tile, statistics_pointer, number: tl.constexpr, row, num_rows, is_channel):
    """What `standardise` made of the rows whose mean and scale were kept, and the scale."""
    place = statistics_pointer + 2 * number * num_rows + row
    mean = tl.load(place, mask=row < num_rows, other=0.0)
    scale = tl.load(place + num_rows, mask=row < num_rows, other=0.0)
    return tl.where(is_channel, (tile - mean) * scale, 0.0), scale


@triton.jit
@no_type_check
def add_pairs(first, second, other_first, other_second):
    return first + other_first, second + other_second


@triton.jit
@no_type_check
def standardise_grad(grad, standard, scale, is_channel, width):
    """Gradient of what `standardise` was given, from that of its result."""
    along_one, along_standard = tl.reduce((grad, grad * standard), 1, add_pairs)
    projected = grad - along_one[:, None] / width - standard * (along_standard[:, None] / width)
    return tl.where(is_channel, projected * scale, 0.0)


@triton.jit
@no_type_check
def vector(vectors_pointer, number: tl.constexpr, channel, is_channel, width):
    """Row `number` of vectors [_, width], float32; 0 outside the channels."""
    return tl.load(vectors_pointer + number * width + channel, mask=is_channel, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def norm_gelu_kernel(
    x_pointer,  # [rows, width]
    norm_pointer,  # [2, width]: weight and bias
    out_pointer,  # [rows, width]
    statistics_pointer,  # [2, rows], float32
    num_rows,
    width,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,  # power of 2 that holds a row
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    is_channel = channel < width
    is_valid = (row < num_rows) & is_channel
    place = row.to(tl.int64) * width + channel
    x = tl.load(x_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
    x = standardise(x, statistics_pointer, 0, row, num_rows, is_channel, width, EPS)
    x = x * vector(norm_pointer, 0, channel, is_channel, width) + vector(
        norm_pointer, 1, channel, is_channel, width
    )
    tl.store(out_pointer + place, gelu(x).to(out_pointer.dtype.element_ty), mask=is_valid)


@triton.jit
@no_type_check
def norm_gelu_grad_kernel(
    grad_out_pointer,  # [rows, width]
    x_pointer,  # [rows, width]
    norm_pointer,  # [2, width]
    statistics_pointer,  # [2, rows], float32
    grad_x_pointer,  # [rows, width]
    partial_pointer,  # [programs, 3, width], float32: gradients of weight and bias, sum of that of x
    num_rows,
    width,
    num_tiles,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.arange(0, CHANNELS)[None, :]
    is_channel = channel < width
    of_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
    of_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    of_x = tl.zeros([ROWS, CHANNELS], tl.float32)
    tile = tl.program_id(0)
    while tile < num_tiles:
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        is_valid = (row < num_rows) & is_channel
        place = row.to(tl.int64) * width + channel
        x = tl.load(x_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
        standard, scale = standardise_again(x, statistics_pointer, 0, row, num_rows, is_channel)
        weight = vector(norm_pointer, 0, channel, is_channel, width)
        normed = standard * weight + vector(norm_pointer, 1, channel, is_channel, width)
        grad = tl.load(grad_out_pointer + place, mask=is_valid, other=0.0).to(tl.float32) * gelu_slope(normed)
        of_weight += grad * standard
        of_bias += grad
        grad = standardise_grad(grad * weight, standard, scale, is_channel, width)
        of_x += grad
        tl.store(grad_x_pointer + place, grad.to(grad_x_pointer.dtype.element_ty), mask=is_valid)
        tile += tl.num_programs(0)
    place = partial_pointer + tl.program_id(0).to(tl.int64) * (3 * width) + tl.arange(0, CHANNELS)
    is_channel = tl.arange(0, CHANNELS) < width
    tl.store(place, tl.sum(of_weight, 0), mask=is_channel)
    tl.store(place + width, tl.sum(of_bias, 0), mask=is_channel)
    tl.store(place + 2 * width, tl.sum(of_x, 0), mask=is_channel)
