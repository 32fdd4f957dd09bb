"""Where does a position sample, and with which weight? What the DCNv3 kernels share, on the device.

`rows` are pointers to packed rows (packed_row.py), one for every position of a program. Kernels bear
`no_type_check` so that the shape checker of the tests leaves them alone: it is their source that counts.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from pretrain.kernels import packed_row

POINTS = tl.constexpr(packed_row.POINTS)
FIRST_LOGIT = tl.constexpr(packed_row.FIRST_LOGIT)
SCALE_LOGIT = tl.constexpr(packed_row.SCALE_LOGIT)
PACKED = tl.constexpr(packed_row.COLUMNS)


@triton.jit
@no_type_check
def packed_number(rows, column: tl.constexpr, is_valid):
    """Column `column` of the packed rows at the pointers `rows`, float32; 0 where the position is not valid."""
    return tl.load(rows + column, mask=is_valid, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def largest_logit(rows, is_valid):
    """Maximum of the nine mask logits: the softmax subtracts it, so that no exponential overflows."""
    largest = packed_number(rows, FIRST_LOGIT, is_valid)
    for point in tl.static_range(1, POINTS):
        largest = tl.maximum(largest, packed_number(rows, FIRST_LOGIT + point, is_valid))
    return largest


@triton.jit
@no_type_check
def exponential(rows, point: tl.constexpr, largest, is_valid):
    """Mask of one point before the division by the sum of all nine."""
    return tl.exp(packed_number(rows, FIRST_LOGIT + point, is_valid) - largest)


@triton.jit
@no_type_check
def location(rows, point: tl.constexpr, row, column, OFFSET_SCALE: tl.constexpr, is_valid):
    """(x, y) in pixels where point `point` of the position (row, column) samples; x outside, y inside."""
    offset_x = packed_number(rows, 2 * point, is_valid)
    offset_y = packed_number(rows, 2 * point + 1, is_valid)
    x = column.to(tl.float32) + (offset_x + (point // 3 - 1)) * OFFSET_SCALE
    y = row.to(tl.float32) + (offset_y + (point % 3 - 1)) * OFFSET_SCALE
    return x, y


@triton.jit
@no_type_check
def cell(x, y, is_valid, height, width):
    """The cell around (x, y): place of its upper left corner in the map, the shares of its right and of its
    lower corners, and which corners (upper left, upper right, lower left, lower right) lie inside the map.
    """
    left, top = tl.floor(x), tl.floor(y)
    share_x, share_y = x - left, y - top
    left, top = left.to(tl.int32), top.to(tl.int32)
    has_left = (left >= 0) & (left < width)
    has_right = (left >= -1) & (left < width - 1)
    has_upper = (top >= 0) & (top < height) & is_valid
    has_lower = (top >= -1) & (top < height - 1) & is_valid
    inside = (has_upper & has_left, has_upper & has_right, has_lower & has_left, has_lower & has_right)
    return top * width + left, share_x, share_y, inside


@triton.jit
@no_type_check
def corner_weights(mask, share_x, share_y):
    """Bilinear weights of upper left, upper right, lower left and lower right corner, times the mask."""
    lower = mask * share_y
    upper = mask - lower
    return upper - upper * share_x, upper * share_x, lower - lower * share_x, lower * share_x


@triton.jit
@no_type_check
def owned_samples(num_samples, height, width, groups, SAMPLES: tl.constexpr):
    """What a program owns: samples, that is positions of the whole batch in one group each, and their validity,
    group, image, place in the image's map, row and column.

    Groups come first: the packed rows of neighbouring threads then lie side by side, and so do the channels that
    they sample wherever their offsets are alike. What bounds these kernels is the number of cache lines that a
    load touches.
    """
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    position = sample // groups
    image = position // (height * width)
    place = position - image * (height * width)
    return (
        sample,
        sample < num_samples,
        sample - position * groups,
        image,
        place,
        place // width,
        place % width,
    )
