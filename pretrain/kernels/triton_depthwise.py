"""How do Triton programs convolve every channel with its own small kernel, and what is the kernels' gradient?

Taps of the kernels come in rows, [size * size, channels], so that neighbouring threads read neighbouring
numbers. A thread computes four neighbouring columns of one row: each number that it reads and converts then
serves several of them, and what is left is close to one instruction a product.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def tap(taps_pointer, tap_row: tl.constexpr, tap_column: tl.constexpr, channels, channel, SIZE: tl.constexpr,
        IS_FLIPPED: tl.constexpr):  # fmt: skip
    """One tap of every channel, float32, [1, channels]; counted from the last one where `IS_FLIPPED`."""
    if IS_FLIPPED:
        number: tl.constexpr = (SIZE - 1 - tap_row) * SIZE + (SIZE - 1 - tap_column)
    else:
        number: tl.constexpr = tap_row * SIZE + tap_column
    return tl.load(taps_pointer + number * channels + channel).to(tl.float32)[None, :]


@triton.jit
@no_type_check
def depthwise_kernel(
    x_pointer,  # [n, h, w, c]
    taps_pointer,  # [size * size, c]
    bias_pointer,  # [c]
    out_pointer,  # [n, h, w, c]
    num_runs,  # n h ceil(w / 4): four columns each
    height,
    width,
    channels,
    SIZE: tl.constexpr,
    IS_FLIPPED: tl.constexpr,  # the gradient of the input: taps from the last to the first, no bias
    RUNS: tl.constexpr,
    CHANNELS: tl.constexpr,  # divides c
):
    """Depth-wise convolution, zero outside the map; sums in float32."""
    REACH: tl.constexpr = SIZE // 2
    across = (width + 3) // 4
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    is_valid = run < num_runs
    line = run // across  # row of the whole batch
    column = (run - line * across) * 4
    row = line % height
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    place = ((line.to(tl.int64) * width + column) * channels)[:, None] + channel[None, :]
    first = tl.zeros([RUNS, CHANNELS], tl.float32)
    second = tl.zeros([RUNS, CHANNELS], tl.float32)
    third = tl.zeros([RUNS, CHANNELS], tl.float32)
    fourth = tl.zeros([RUNS, CHANNELS], tl.float32)
    for tap_row in tl.static_range(SIZE):
        y = row + (tap_row - REACH)
        is_row = is_valid & (y >= 0) & (y < height)
        for step in tl.static_range(SIZE + 3):
            x = column + (step - REACH)
            inside = is_row & (x >= 0) & (x < width)
            shift = ((tap_row - REACH) * width + (step - REACH)) * channels
            near = tl.load(x_pointer + place + shift, mask=inside[:, None], other=0.0).to(tl.float32)
            if step < SIZE:
                first += near * tap(taps_pointer, tap_row, step, channels, channel, SIZE, IS_FLIPPED)
            if (step >= 1) & (step < SIZE + 1):
                second += near * tap(taps_pointer, tap_row, step - 1, channels, channel, SIZE, IS_FLIPPED)
            if (step >= 2) & (step < SIZE + 2):
                third += near * tap(taps_pointer, tap_row, step - 2, channels, channel, SIZE, IS_FLIPPED)
            if step >= 3:
                fourth += near * tap(taps_pointer, tap_row, step - 3, channels, channel, SIZE, IS_FLIPPED)
    if not IS_FLIPPED:
        bias = tl.load(bias_pointer + channel).to(tl.float32)[None, :]
        first, second, third, fourth = first + bias, second + bias, third + bias, fourth + bias
    out = out_pointer + place
    tl.store(out, first.to(out_pointer.dtype.element_ty), mask=is_valid[:, None])
    is_second, is_third, is_fourth = column + 1 < width, column + 2 < width, column + 3 < width
    out += channels
    tl.store(out, second.to(out_pointer.dtype.element_ty), mask=(is_valid & is_second)[:, None])
    out += channels
    tl.store(out, third.to(out_pointer.dtype.element_ty), mask=(is_valid & is_third)[:, None])
    out += channels
    tl.store(out, fourth.to(out_pointer.dtype.element_ty), mask=(is_valid & is_fourth)[:, None])


@triton.jit
@no_type_check
def depthwise_grad_taps_kernel(
    grad_out_pointer,  # [n, h, w, c]
    x_pointer,  # [n, h, w, c]
    partial_pointer,  # [programs, size * size, c], float32
    num_runs,  # n h ceil(w / 4): four columns each
    height,
    width,
    channels,
    num_tiles,  # of RUNS
    SIZE: tl.constexpr,  # 3 or 5
    RUNS: tl.constexpr,
    CHANNELS: tl.constexpr,  # divides c
):
    """Gradient of one row of taps, which is axis 2 of the grid; every program takes some of the tiles."""
    REACH: tl.constexpr = SIZE // 2
    tap_row = tl.program_id(2)
    across = (width + 3) // 4
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.zeros([RUNS, CHANNELS], tl.float32)
    second = tl.zeros([RUNS, CHANNELS], tl.float32)
    third = tl.zeros([RUNS, CHANNELS], tl.float32)
    fourth = tl.zeros([RUNS, CHANNELS], tl.float32)
    fifth = tl.zeros([RUNS, CHANNELS], tl.float32)
    tile = tl.program_id(0)
    while tile < num_tiles:
        run = tile * RUNS + tl.arange(0, RUNS)
        line = run // across
        column = (run - line * across) * 4
        place = ((line.to(tl.int64) * width + column) * channels)[:, None] + channel[None, :]
        is_valid = run < num_runs
        grad_out = grad_out_pointer + place
        grad_0 = tl.load(grad_out, mask=is_valid[:, None], other=0.0).to(tl.float32)
        inside = is_valid & (column + 1 < width)
        grad_1 = tl.load(grad_out + channels, mask=inside[:, None], other=0.0).to(tl.float32)
        inside = is_valid & (column + 2 < width)
        grad_2 = tl.load(grad_out + 2 * channels, mask=inside[:, None], other=0.0).to(tl.float32)
        inside = is_valid & (column + 3 < width)
        grad_3 = tl.load(grad_out + 3 * channels, mask=inside[:, None], other=0.0).to(tl.float32)
        y = line % height + (tap_row - REACH)
        is_row = is_valid & (y >= 0) & (y < height)
        near = x_pointer + place + (tap_row - REACH) * width * channels
        for step in tl.static_range(SIZE + 3):
            x = column + (step - REACH)
            inside = is_row & (x >= 0) & (x < width)
            number = tl.load(near + (step - REACH) * channels, mask=inside[:, None], other=0.0).to(tl.float32)
            first = add_product(first, number, grad_0, grad_1, grad_2, grad_3, step)
            second = add_product(second, number, grad_0, grad_1, grad_2, grad_3, step - 1)
            third = add_product(third, number, grad_0, grad_1, grad_2, grad_3, step - 2)
            if SIZE == 5:
                fourth = add_product(fourth, number, grad_0, grad_1, grad_2, grad_3, step - 3)
                fifth = add_product(fifth, number, grad_0, grad_1, grad_2, grad_3, step - 4)
        tile += tl.num_programs(0)
    row = tl.program_id(0).to(tl.int64) * (SIZE * SIZE) + tap_row * SIZE
    partial = partial_pointer + row * channels + channel
    tl.store(partial, tl.sum(first, 0))
    tl.store(partial + channels, tl.sum(second, 0))
    tl.store(partial + 2 * channels, tl.sum(third, 0))
    if SIZE == 5:
        tl.store(partial + 3 * channels, tl.sum(fourth, 0))
        tl.store(partial + 4 * channels, tl.sum(fifth, 0))


@triton.jit
@no_type_check
def add_product(total, number, grad_0, grad_1, grad_2, grad_3, column: tl.constexpr):
    """`total` plus `number` times the gradient of one of the four columns; as it was for any other column."""
    if column == 0:
        total += number * grad_0
    elif column == 1:
        total += number * grad_1
    elif column == 2:
        total += number * grad_2
    elif column == 3:
        total += number * grad_3
    return total
