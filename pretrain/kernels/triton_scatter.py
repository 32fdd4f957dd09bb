"""What is the gradient of DCNv3's input value? Two Triton answers: a deterministic product, and atomic sums.

The product: dX = S' dOut, where S[q, p] is the sum over the points of mask hat(x - p_x) hat(y - p_y) with
hat(t) = max(0, 1 - |t|), the bilinear weight with which position q samples position p. A program owns the
positions p of one tile, one group and one image, forms S for one tile of positions q after the other and
multiplies on tensor cores: nothing is scattered, so the order of the sums never changes. On large maps a
first kernel notes the rectangle that each tile of positions q samples, and tiles that miss are skipped: exact
for any offset, and cheap as long as offsets stay small.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from pretrain.kernels.triton_points import (
    PACKED,
    POINTS,
    SCALE_LOGIT,
    cell,
    corner_weights,
    exponential,
    largest_logit,
    location,
    owned_positions,
    packed_number,
)


@triton.jit
@no_type_check
def tile_positions(
    tile, height, width, tiles_across, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_BANDED: tl.constexpr
):
    """Row, column and validity of the positions of one tile: a rectangle, or a run where nothing is skipped."""
    step = tl.arange(0, ROWS * COLUMNS)
    if IS_BANDED:
        row = (tile // tiles_across) * ROWS + step // COLUMNS
        column = (tile % tiles_across) * COLUMNS + step % COLUMNS
        is_valid = (row < height) & (column < width)
    else:
        place = tile * (ROWS * COLUMNS) + step
        row = place // width
        column = place - row * width
        is_valid = row < height
    return row, column, is_valid


@triton.jit
@no_type_check
def reach_kernel(
    packed_pointer,  # [n, h, w, groups, 32]
    reach_pointer,  # [n, groups, tiles, 4]: least and greatest x, least and greatest y that the tile samples
    height,
    width,
    groups,
    tiles_across,
    OFFSET_SCALE: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
):
    tile, group, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column, is_valid = tile_positions(tile, height, width, tiles_across, QUERY_ROWS, QUERY_COLUMNS, True)
    position = image.to(tl.int64) * (height * width) + row * width + column
    rows = packed_pointer + (position * groups + group) * PACKED
    x, y = location(rows, 0, row, column, OFFSET_SCALE, is_valid)
    least_x, greatest_x, least_y, greatest_y = x, x, y, y
    for point in tl.static_range(1, POINTS):
        x, y = location(rows, point, row, column, OFFSET_SCALE, is_valid)
        least_x, greatest_x = tl.minimum(least_x, x), tl.maximum(greatest_x, x)
        least_y, greatest_y = tl.minimum(least_y, y), tl.maximum(greatest_y, y)
    reach = reach_pointer + ((image.to(tl.int64) * groups + group) * tl.num_programs(0) + tile) * 4
    tl.store(reach, tl.min(tl.where(is_valid, least_x, float("inf")), 0))
    tl.store(reach + 1, tl.max(tl.where(is_valid, greatest_x, float("-inf")), 0))
    tl.store(reach + 2, tl.min(tl.where(is_valid, least_y, float("inf")), 0))
    tl.store(reach + 3, tl.max(tl.where(is_valid, greatest_y, float("-inf")), 0))


@triton.jit
@no_type_check
def hat(distance):
    """Bilinear weight along one axis of what lies `distance` pixels away."""
    return tl.maximum(1.0 - tl.abs(distance), 0.0)


@triton.jit
@no_type_check
def add_tile(
    total,  # [ROWS * COLUMNS, GROUP_WIDTH], float32
    grad_out_group,
    packed_group,
    tile,
    first_row,
    first_column,
    height,
    width,
    groups,
    tiles_across,
    GROUP_WIDTH: tl.constexpr,
    OFFSET_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    IS_BANDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`total` plus what the positions q of one tile give to the positions p of this program."""
    QUERIES: tl.constexpr = QUERY_ROWS * QUERY_COLUMNS
    row, column, is_valid = tile_positions(
        tile, height, width, tiles_across, QUERY_ROWS, QUERY_COLUMNS, IS_BANDED
    )
    place = row * width + column
    rows = packed_group + place * (groups * PACKED)
    p_y = (first_row + tl.arange(0, ROWS)).to(tl.float32)[:, None]
    p_x = (first_column + tl.arange(0, COLUMNS)).to(tl.float32)[:, None]
    largest = largest_logit(rows, is_valid)
    mask_total = tl.zeros([QUERIES], tl.float32)
    weights = tl.zeros([ROWS, COLUMNS, QUERIES], tl.float32)
    for point in tl.static_range(POINTS):
        x, y = location(rows, point, row, column, OFFSET_SCALE, is_valid)
        mask = exponential(rows, point, largest, is_valid)
        mask_total += mask
        vertical = hat(y[None, :] - p_y) * mask[None, :]
        weights += vertical[:, None, :] * hat(x[None, :] - p_x)[None, :, :]
    share = 1.0 / mask_total
    if HAS_SCALE:
        share *= 1.0 - tl.sigmoid(packed_number(rows, SCALE_LOGIT, is_valid))
    weights *= share[None, None, :]
    out = grad_out_group + place[:, None] * (groups * GROUP_WIDTH) + tl.arange(0, GROUP_WIDTH)[None, :]
    grad = tl.load(out, mask=is_valid[:, None], other=0.0)
    if PRECISION == "interpreted":  # the interpreter multiplies the bits of narrow numbers: NumPy knows none
        return tl.dot(tl.reshape(weights, [ROWS * COLUMNS, QUERIES]), grad.to(tl.float32), total)
    weights = tl.reshape(weights.to(grad.dtype), [ROWS * COLUMNS, QUERIES])
    return tl.dot(weights, grad, total, input_precision=PRECISION)


@triton.jit
@no_type_check
def grad_value_kernel(
    grad_out_pointer,  # [n, h, w, c]
    packed_pointer,  # [n, h, w, groups, 32]
    reach_pointer,  # [n, groups, tiles, 4]; read only where IS_BANDED
    grad_value_pointer,  # [n, h, w, c]
    height,
    width,
    groups,
    num_tiles,  # of positions q in one image
    tiles_across,
    GROUP_WIDTH: tl.constexpr,
    OFFSET_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    IS_BANDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, image = tl.program_id(1), tl.program_id(2)
    across = tl.cdiv(width, COLUMNS)
    first_row = (tl.program_id(0) // across) * ROWS
    first_column = (tl.program_id(0) % across) * COLUMNS
    channels = groups * GROUP_WIDTH
    image_start = image.to(tl.int64) * (height * width)
    grad_out_group = grad_out_pointer + image_start * channels + group * GROUP_WIDTH
    packed_group = packed_pointer + (image_start * groups + group) * PACKED
    reach = reach_pointer + (image.to(tl.int64) * groups + group) * num_tiles * 4
    total = tl.zeros([ROWS * COLUMNS, GROUP_WIDTH], tl.float32)
    tile = 0
    while tile < num_tiles:
        is_hit = True
        if IS_BANDED:
            is_hit = (tl.load(reach + 4 * tile) < first_column + COLUMNS) & (
                tl.load(reach + 4 * tile + 1) > first_column - 1
            )
            is_hit &= tl.load(reach + 4 * tile + 2) < first_row + ROWS
            is_hit &= tl.load(reach + 4 * tile + 3) > first_row - 1
        if is_hit:
            total = add_tile(
                total, grad_out_group, packed_group, tile, first_row, first_column, height, width, groups,
                tiles_across, GROUP_WIDTH, OFFSET_SCALE, HAS_SCALE, ROWS, COLUMNS, QUERY_ROWS, QUERY_COLUMNS,
                IS_BANDED, PRECISION,
            )  # fmt: skip
        tile += 1
    step = tl.arange(0, ROWS * COLUMNS)
    row, column = first_row + step // COLUMNS, first_column + step % COLUMNS
    is_valid = (row < height) & (column < width)
    place = row * width + column
    numbers = place[:, None] * channels + tl.arange(0, GROUP_WIDTH)[None, :]
    if HAS_SCALE:
        scale = tl.sigmoid(packed_number(packed_group + place * (groups * PACKED), SCALE_LOGIT, is_valid))
        grad = tl.load(grad_out_group + numbers, mask=is_valid[:, None], other=0.0)
        total += grad.to(tl.float32) * scale[:, None]
    out = grad_value_pointer + image_start * channels + group * GROUP_WIDTH + numbers
    tl.store(out, total.to(grad_value_pointer.dtype.element_ty), mask=is_valid[:, None])


@triton.jit
@no_type_check
def grad_value_atomic_kernel(
    grad_out_pointer,  # [n, h, w, c]
    packed_pointer,  # [n, h, w, groups, 32]
    grad_value_pointer,  # [n, h, w, c], float32, zeros at the start
    num_positions,  # n h w
    height,
    width,
    groups,
    GROUP_WIDTH: tl.constexpr,
    OFFSET_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Adds every position's gradient to the corners that it sampled, in the order in which programs arrive."""
    channels = groups * GROUP_WIDTH
    group = tl.program_id(1)
    position, is_valid, image, place, row, column = owned_positions(num_positions, height, width, POSITIONS)
    rows = packed_pointer + (position.to(tl.int64) * groups + group) * PACKED
    images = grad_value_pointer + image.to(tl.int64) * (height * width * channels) + group * GROUP_WIDTH
    channel = tl.arange(0, GROUP_WIDTH)[None, :]
    out = (grad_out_pointer + position.to(tl.int64) * channels + group * GROUP_WIDTH)[:, None] + channel
    grad = tl.load(out, mask=is_valid[:, None], other=0.0).to(tl.float32)
    largest = largest_logit(rows, is_valid)
    total = tl.zeros([POSITIONS], tl.float32)
    for point in tl.static_range(POINTS):
        total += exponential(rows, point, largest, is_valid)
    share = 1.0 / total
    if HAS_SCALE:
        scale = tl.sigmoid(packed_number(rows, SCALE_LOGIT, is_valid))
        share *= 1.0 - scale
        centre = (images + place * channels)[:, None] + channel
        tl.atomic_add(centre, grad * scale[:, None], mask=is_valid[:, None], sem="relaxed")
    for point in tl.static_range(POINTS):
        x, y = location(rows, point, row, column, OFFSET_SCALE, is_valid)
        mask = exponential(rows, point, largest, is_valid) * share
        corner, share_x, share_y, inside = cell(x, y, is_valid, height, width)
        weights = corner_weights(mask, share_x, share_y)
        start = (images + corner * channels)[:, None] + channel
        tl.atomic_add(start, grad * weights[0][:, None], mask=inside[0][:, None], sem="relaxed")
        tl.atomic_add(start + channels, grad * weights[1][:, None], mask=inside[1][:, None], sem="relaxed")
        start += width * channels
        tl.atomic_add(start, grad * weights[2][:, None], mask=inside[2][:, None], sem="relaxed")
        tl.atomic_add(start + channels, grad * weights[3][:, None], mask=inside[3][:, None], sem="relaxed")
