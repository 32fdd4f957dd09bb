"""How does one Triton program sample DCNv3, and what is the gradient of its packed rows?

A program owns SAMPLES consecutive samples: a sample is one group at one position of the whole batch, groups
first, so that small maps waste no lane.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from pretrain.kernels.triton_points import (
    FIRST_LOGIT,
    PACKED,
    POINTS,
    SCALE_LOGIT,
    cell,
    corner_weights,
    exponential,
    largest_logit,
    location,
    owned_samples,
    packed_number,
)


@triton.jit
@no_type_check
def add(total, start, weight, inside):
    """`total` plus the weighted value at `start`; nothing where that lies outside the map."""
    return total + tl.load(start, mask=inside[:, None], other=0.0).to(tl.float32) * weight[:, None]


@triton.jit
@no_type_check
def sample_kernel(
    value_pointer,  # [n, h, w, c]
    packed_pointer,  # [n, h, w, groups, 32]
    out_pointer,  # [n, h, w, c]
    num_samples,  # n h w groups
    height,
    width,
    groups,
    GROUP_WIDTH: tl.constexpr,
    OFFSET_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Softmax over the points, bilinear samples, weighted sum, blend with the centre; sums in float32."""
    channels = groups * GROUP_WIDTH
    sample, is_valid, group, image, place, row, column = owned_samples(
        num_samples, height, width, groups, SAMPLES
    )
    rows = packed_pointer + sample.to(tl.int64) * PACKED
    images = value_pointer + image.to(tl.int64) * (height * width * channels) + group * GROUP_WIDTH
    channel = tl.arange(0, GROUP_WIDTH)[None, :]
    largest = largest_logit(rows, is_valid)
    total = tl.zeros([SAMPLES], tl.float32)
    sums = tl.zeros([SAMPLES, GROUP_WIDTH], tl.float32)
    for point in tl.static_range(POINTS):
        x, y = location(rows, point, row, column, OFFSET_SCALE, is_valid)
        mask = exponential(rows, point, largest, is_valid)
        total += mask
        corner, share_x, share_y, inside = cell(x, y, is_valid, height, width)
        weights = corner_weights(mask, share_x, share_y)
        start = (images + corner * channels)[:, None] + channel
        sums = add(sums, start, weights[0], inside[0])
        sums = add(sums, start + channels, weights[1], inside[1])
        start += width * channels
        sums = add(sums, start, weights[2], inside[2])
        sums = add(sums, start + channels, weights[3], inside[3])
    sampled_share = 1.0 / total
    if HAS_SCALE:
        scale = tl.sigmoid(packed_number(rows, SCALE_LOGIT, is_valid))
        sampled_share *= 1.0 - scale
    sums *= sampled_share[:, None]
    if HAS_SCALE:
        sums = add(sums, (images + place * channels)[:, None] + channel, scale, is_valid)
    out = (out_pointer + sample.to(tl.int64) * GROUP_WIDTH)[:, None] + channel
    tl.store(out, sums.to(out_pointer.dtype.element_ty), mask=is_valid[:, None])


@triton.jit
@no_type_check
def product(start, inside, grad_first, grad_second, SLICE: tl.constexpr, IS_WIDE: tl.constexpr):
    """<gradient of the output, value at `start`> over the group's channels; one or two slices of them."""
    inside = inside[:, None]
    terms = tl.load(start, mask=inside, other=0.0).to(tl.float32) * grad_first
    if IS_WIDE:
        terms += tl.load(start + SLICE, mask=inside, other=0.0).to(tl.float32) * grad_second
    return tl.sum(terms, 1)


@triton.jit
@no_type_check
def put(tile, number, column: tl.constexpr, columns):
    """The tile with `number` added in the column `column`; nothing where the tile does not have it."""
    return tl.where(columns == column, tile + number[:, None], tile)


@triton.jit
@no_type_check
def grad_packed_kernel(
    grad_out_pointer,  # [n, h, w, c]
    value_pointer,  # [n, h, w, c]
    packed_pointer,  # [n, h, w, groups, 32]
    grad_packed_pointer,  # [n, h, w, groups, 32]
    num_samples,  # n h w groups
    height,
    width,
    groups,
    GROUP_WIDTH: tl.constexpr,
    OFFSET_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Gradient of offsets, mask logits and centre scale; padding gets zeros.

    All of it is linear in the products of the output's gradient with the sampled corners. The packed row is
    put together in two register tiles of the layout that the channels have, and stored as vectors: no value
    crosses shared memory.
    """
    SLICE: tl.constexpr = PACKED // 2
    IS_WIDE: tl.constexpr = GROUP_WIDTH == 32
    channels = groups * GROUP_WIDTH
    sample, is_valid, group, image, place, row, column = owned_samples(
        num_samples, height, width, groups, SAMPLES
    )
    row_start = sample.to(tl.int64) * PACKED
    rows = packed_pointer + row_start
    images = value_pointer + image.to(tl.int64) * (height * width * channels) + group * GROUP_WIDTH
    columns = tl.arange(0, SLICE)[None, :]
    out = (grad_out_pointer + sample.to(tl.int64) * GROUP_WIDTH)[:, None] + columns
    grad_first = tl.load(out, mask=is_valid[:, None], other=0.0).to(tl.float32)
    grad_second = grad_first
    if IS_WIDE:
        grad_second = tl.load(out + SLICE, mask=is_valid[:, None], other=0.0).to(tl.float32)
    right_rows = rows[:, None] + SLICE + columns
    logits = tl.load(right_rows, mask=is_valid[:, None], other=0.0).to(tl.float32)
    is_logit = (columns >= FIRST_LOGIT - SLICE) & (columns < SCALE_LOGIT - SLICE)
    logits = tl.where(is_logit, logits, float("-inf"))
    largest = tl.max(logits, 1)
    masks = tl.exp(logits - largest[:, None])
    total = tl.sum(masks, 1)
    along = tl.zeros([SAMPLES], tl.float32)  # <gradient of the output, sampled value> times the total
    left_tile = tl.zeros([SAMPLES, SLICE], tl.float32)  # columns 0 to 15 of the packed row
    right_tile = tl.zeros([SAMPLES, SLICE], tl.float32)  # columns 16 to 31
    for point in tl.static_range(POINTS):
        x, y = location(rows, point, row, column, OFFSET_SCALE, is_valid)
        mask = exponential(rows, point, largest, is_valid)
        corner, share_x, share_y, inside = cell(x, y, is_valid, height, width)
        start = (images + corner * channels)[:, None] + columns
        upper_left = product(start, inside[0], grad_first, grad_second, SLICE, IS_WIDE)
        upper_right = product(start + channels, inside[1], grad_first, grad_second, SLICE, IS_WIDE)
        start += width * channels
        lower_left = product(start, inside[2], grad_first, grad_second, SLICE, IS_WIDE)
        lower_right = product(start + channels, inside[3], grad_first, grad_second, SLICE, IS_WIDE)
        slope_upper, slope_lower = upper_right - upper_left, lower_right - lower_left
        upper = upper_left + share_x * slope_upper
        slope_y = lower_left + share_x * slope_lower - upper
        slope_x = slope_upper + share_y * (slope_lower - slope_upper)
        sampled = mask * (upper + share_y * slope_y)
        along += sampled
        slope_x, slope_y = slope_x * (mask * OFFSET_SCALE), slope_y * (mask * OFFSET_SCALE)
        if 2 * point < SLICE:
            left_tile = put(left_tile, slope_x, 2 * point, columns)
            left_tile = put(left_tile, slope_y, 2 * point + 1, columns)
        else:
            right_tile = put(right_tile, slope_x, 2 * point - SLICE, columns)
            right_tile = put(right_tile, slope_y, 2 * point + 1 - SLICE, columns)
        right_tile = put(right_tile, sampled, FIRST_LOGIT + point - SLICE, columns)
    mean, sampled_share = along / total, 1.0 / total
    right_tile -= masks * mean[:, None]
    if HAS_SCALE:
        scale = tl.sigmoid(packed_number(rows, SCALE_LOGIT, is_valid))
        sampled_share *= 1.0 - scale
    right_tile *= sampled_share[:, None]
    if HAS_SCALE:
        centre = (images + place * channels)[:, None] + columns
        difference = product(centre, is_valid, grad_first, grad_second, SLICE, IS_WIDE) - mean
        right_tile = put(right_tile, difference * scale * (1.0 - scale), SCALE_LOGIT - SLICE, columns)
    left_tile *= sampled_share[:, None]
    grad_rows = (grad_packed_pointer + row_start)[:, None] + columns
    tl.store(grad_rows, left_tile.to(grad_packed_pointer.dtype.element_ty), mask=is_valid[:, None])
    tl.store(grad_rows + SLICE, right_tile.to(grad_packed_pointer.dtype.element_ty), mask=is_valid[:, None])
