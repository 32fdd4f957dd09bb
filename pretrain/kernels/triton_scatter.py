"""What is the gradient of DCNv3's input value? Two Triton answers: a deterministic product, and atomic sums.

The product: dX = S' dOut, where S[q, p] is the sum over the points of mask hat(x - p_x) hat(y - p_y) with
hat(t) = max(0, 1 - |t|), the bilinear weight with which position q samples position p. A first kernel lays out
where the positions q of a tile sample, and how much, so that each number of all of them is one cache line. A
program of the second owns the positions p of one tile, one group and one image, forms S for one tile of
positions q after the other and multiplies on tensor cores: nothing is scattered, so the order of the sums never
changes. On large maps the first kernel also notes the rectangle that each tile of positions q samples, and tiles
that miss are skipped: exact for any offset, and cheap as long as offsets stay small.
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

CHUNK = tl.constexpr(128)  # tiles of positions q whose reach a program reads at a time


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
def arrange_kernel(
    packed_pointer,  # [n, h, w, groups, 32]
    arranged_pointer,  # [n, groups, tiles, 27, queries], float32: x and y of every point, then every mask
    reach_pointer,  # [n, groups, tiles, 4]: least and greatest x, least and greatest y that the tile samples
    height,
    width,
    groups,
    tiles_across,
    OFFSET_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    IS_BANDED: tl.constexpr,  # write the reach
):
    """The numbers of one tile's packed rows, finished and turned; masks hold the share that is sampled."""
    QUERIES: tl.constexpr = QUERY_ROWS * QUERY_COLUMNS
    tile, group, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column, is_valid = tile_positions(
        tile, height, width, tiles_across, QUERY_ROWS, QUERY_COLUMNS, IS_BANDED
    )
    position = image.to(tl.int64) * (height * width) + row * width + column
    number = tl.arange(0, PACKED)[None, :]
    rows = (packed_pointer + (position * groups + group) * PACKED)[:, None] + number
    numbers = tl.load(rows, mask=is_valid[:, None], other=0.0).to(tl.float32)
    is_logit = (number >= FIRST_LOGIT) & (number < SCALE_LOGIT)
    logits = tl.where(is_logit, numbers, float("-inf"))
    masks = tl.exp(logits - tl.max(logits, 1)[:, None])
    share = 1.0 / tl.sum(masks, 1)
    if HAS_SCALE:
        share *= 1.0 - tl.sigmoid(tl.sum(tl.where(number == SCALE_LOGIT, numbers, 0.0), 1))
    is_x, point = number % 2 == 0, number // 2
    grid = tl.where(is_x, point // 3, point % 3) - 1
    own = tl.where(is_x, column[:, None], row[:, None]).to(tl.float32)
    locations = own + (numbers + grid) * OFFSET_SCALE
    finished = tl.where(is_logit, masks * share[:, None], locations)
    whole_tile = (image.to(tl.int64) * groups + group) * tl.num_programs(0) + tile
    arranged = arranged_pointer + whole_tile * (SCALE_LOGIT * QUERIES)
    query = tl.arange(0, QUERIES)[:, None]
    tl.store(arranged + number * QUERIES + query, finished, mask=number < SCALE_LOGIT)
    if IS_BANDED:
        reach = reach_pointer + whole_tile * 4
        counts = is_valid[:, None] & (number < FIRST_LOGIT)
        least, greatest = float("inf"), float("-inf")
        tl.store(reach, tl.min(tl.min(tl.where(counts & is_x, locations, least), 1), 0))
        tl.store(reach + 1, tl.max(tl.max(tl.where(counts & is_x, locations, greatest), 1), 0))
        is_y = number % 2 == 1
        tl.store(reach + 2, tl.min(tl.min(tl.where(counts & is_y, locations, least), 1), 0))
        tl.store(reach + 3, tl.max(tl.max(tl.where(counts & is_y, locations, greatest), 1), 0))


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
    arranged,
    tile,
    first_row,
    first_column,
    height,
    width,
    channels,
    tiles_across,
    GROUP_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    IS_BANDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`total` plus what the positions q of one tile give to the positions p of this program."""
    QUERIES: tl.constexpr = QUERY_ROWS * QUERY_COLUMNS
    numbers = arranged + tile * (SCALE_LOGIT * QUERIES) + tl.arange(0, QUERIES)
    p_y = (first_row + tl.arange(0, ROWS)).to(tl.float32)[:, None]
    p_x = (first_column + tl.arange(0, COLUMNS)).to(tl.float32)[:, None]
    weights = tl.zeros([ROWS, COLUMNS, QUERIES], tl.float32)
    for point in tl.static_range(POINTS):
        x = tl.load(numbers + 2 * point * QUERIES)
        y = tl.load(numbers + (2 * point + 1) * QUERIES)
        mask = tl.load(numbers + (FIRST_LOGIT + point) * QUERIES)
        vertical = hat(y[None, :] - p_y) * mask[None, :]
        weights += vertical[:, None, :] * hat(x[None, :] - p_x)[None, :, :]
    row, column, is_valid = tile_positions(
        tile, height, width, tiles_across, QUERY_ROWS, QUERY_COLUMNS, IS_BANDED
    )
    out = grad_out_group + (row * width + column)[:, None] * channels + tl.arange(0, GROUP_WIDTH)[None, :]
    grad = tl.load(out, mask=is_valid[:, None], other=0.0)
    if PRECISION == "interpreted":  # the interpreter multiplies the bits of narrow numbers: NumPy knows none
        return tl.dot(tl.reshape(weights, [ROWS * COLUMNS, QUERIES]), grad.to(tl.float32), total)
    weights = tl.reshape(weights.to(grad.dtype), [ROWS * COLUMNS, QUERIES])
    return tl.dot(weights, grad, total, input_precision=PRECISION)


@triton.jit
@no_type_check
def tiles_that_hit(
    reach, tile, num_tiles, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Which of the tiles `tile` sample a position of the program's own tile."""
    is_tile = tile < num_tiles
    start = reach + 4 * tile
    hits = is_tile & (tl.load(start, mask=is_tile, other=0.0) < first_column + COLUMNS)
    hits &= tl.load(start + 1, mask=is_tile, other=0.0) > first_column - 1
    hits &= tl.load(start + 2, mask=is_tile, other=0.0) < first_row + ROWS
    return hits & (tl.load(start + 3, mask=is_tile, other=0.0) > first_row - 1)


@triton.jit
@no_type_check
def grad_value_kernel(
    grad_out_pointer,  # [n, h, w, c]
    packed_pointer,  # [n, h, w, groups, 32]
    arranged_pointer,  # [n, groups, tiles, 27, queries]
    reach_pointer,  # [n, groups, tiles, 4]; read only where IS_BANDED
    grad_value_pointer,  # [n, h, w, c]
    height,
    width,
    groups,
    num_tiles,  # of positions q in one image
    tiles_across,
    GROUP_WIDTH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    IS_BANDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    QUERIES: tl.constexpr = QUERY_ROWS * QUERY_COLUMNS
    group, image = tl.program_id(1), tl.program_id(2)
    across = tl.cdiv(width, COLUMNS)
    first_row = (tl.program_id(0) // across) * ROWS
    first_column = (tl.program_id(0) % across) * COLUMNS
    channels = groups * GROUP_WIDTH
    image_start = image.to(tl.int64) * (height * width)
    grad_out_group = grad_out_pointer + image_start * channels + group * GROUP_WIDTH
    first_tile = (image.to(tl.int64) * groups + group) * num_tiles
    arranged = arranged_pointer + first_tile * (SCALE_LOGIT * QUERIES)
    total = tl.zeros([ROWS * COLUMNS, GROUP_WIDTH], tl.float32)
    if IS_BANDED:
        chunk = 0
        while chunk < num_tiles:  # what hits is found for many tiles at a time, without a wait for each
            tiles = chunk + tl.arange(0, CHUNK)
            hits = tiles_that_hit(
                reach_pointer + first_tile * 4, tiles, num_tiles, first_row, first_column, ROWS, COLUMNS
            )
            tile = tl.min(tl.where(hits, tiles, num_tiles), 0)
            while tile < num_tiles:
                total = add_tile(
                    total, grad_out_group, arranged, tile, first_row, first_column, height, width, channels,
                    tiles_across, GROUP_WIDTH, ROWS, COLUMNS, QUERY_ROWS, QUERY_COLUMNS, IS_BANDED, PRECISION,
                )  # fmt: skip
                tile = tl.min(tl.where(hits & (tiles > tile), tiles, num_tiles), 0)
            chunk += CHUNK
    else:
        tile = 0
        while tile < num_tiles:
            total = add_tile(
                total, grad_out_group, arranged, tile, first_row, first_column, height, width, channels,
                tiles_across, GROUP_WIDTH, ROWS, COLUMNS, QUERY_ROWS, QUERY_COLUMNS, IS_BANDED, PRECISION,
            )  # fmt: skip
            tile += 1
    step = tl.arange(0, ROWS * COLUMNS)
    row, column = first_row + step // COLUMNS, first_column + step % COLUMNS
    is_valid = (row < height) & (column < width)
    place = row * width + column
    numbers = place[:, None] * channels + tl.arange(0, GROUP_WIDTH)[None, :]
    if HAS_SCALE:
        rows = packed_pointer + ((image_start + place) * groups + group) * PACKED
        scale = tl.sigmoid(packed_number(rows, SCALE_LOGIT, is_valid))
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
    num_samples,  # n h w groups
    height,
    width,
    groups,
    GROUP_WIDTH: tl.constexpr,
    OFFSET_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Adds every position's gradient to the corners that it sampled, in the order in which programs arrive."""
    channels = groups * GROUP_WIDTH
    sample, is_valid, group, image, place, row, column = owned_samples(
        num_samples, height, width, groups, SAMPLES
    )
    rows = packed_pointer + sample.to(tl.int64) * PACKED
    images = grad_value_pointer + image.to(tl.int64) * (height * width * channels) + group * GROUP_WIDTH
    channel = tl.arange(0, GROUP_WIDTH)[None, :]
    out = (grad_out_pointer + sample.to(tl.int64) * GROUP_WIDTH)[:, None] + channel
    grad = tl.load(out, mask=is_valid[:, None], other=0.0).to(tl.float32)
    largest = largest_logit(rows, is_valid)
    total = tl.zeros([SAMPLES], tl.float32)
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
