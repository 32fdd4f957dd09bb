"""How do Triton programs sum a tall matrix over its rows, as the gradient of every bias needs?"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def column_sum_kernel(
    x_pointer,  # [rows, width]
    partial_pointer,  # [programs, width], float32
    num_rows,
    width,
    rows_a_program,  # multiple of ROWS
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums over one run of rows and CHANNELS columns; the order of the additions never changes."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    first = tl.program_id(0) * rows_a_program
    last = tl.minimum(first + rows_a_program, num_rows)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    row = first + tl.arange(0, ROWS)[:, None]
    while first < last:
        is_valid = (row < last) & (channel < width)
        total += tl.load(x_pointer + row.to(tl.int64) * width + channel, mask=is_valid, other=0.0).to(
            tl.float32
        )
        row += ROWS
        first += ROWS
    out = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(
        partial_pointer + tl.program_id(0).to(tl.int64) * width + out, tl.sum(total, 0), mask=out < width
    )
