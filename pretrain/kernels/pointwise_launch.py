"""How are the Triton kernels around DCNv3 launched? It follows from the shape.

They wait for memory, and what counts is whole vectors and no spills (tests/kernels/test_pointwise_sass.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

NUMBERS = 1024  # that one program of an elementwise kernel takes
FORWARD, BACKWARD = 32, 16  # bytes of every tensor that a thread of a kernel of whole rows holds
MAX_WARPS = 16
GRAD_PROGRAMS = 1024  # at most, of a gradient: 8 on each of the 132 processors of an H200
ROWS_A_PROGRAM = 16  # at least, of a gradient: its partial sums are then a sixth of what it reads, or less
TAP_PROGRAMS = 2048  # of the taps' gradient, about


@dataclass(frozen=True)
class Rows:
    """Launch of a kernel that owns whole rows of channels."""

    rows: int  # power of 2
    channels: int  # power of 2, holds a row
    warps: int


def rows_launch(width: int, itemsize: int, held: int) -> Rows:
    """`held` bytes of every tensor a thread, as far as warps suffice."""
    channels = triton.next_power_of_2(width)
    rows = max(1, 1024 // channels)
    return Rows(rows, channels, warps=min(rows * channels * itemsize // (32 * held), MAX_WARPS))


@dataclass(frozen=True)
class Tile:
    """Launch of a depth-wise kernel."""

    runs: int  # of four columns each; power of 2
    channels: int  # power of 2 that divides the map's channels
    warps: int


def tile_launch(channels: int, itemsize: int) -> Tile:
    """One vector of 16 bytes and four columns a thread; up to 64 channels, as many as divide the map's."""
    part = min(channels & -channels, 64)
    return Tile(2048 // itemsize // part, part, warps=4)


def row_counts(x: Tensor) -> tuple[int, int, int]:
    """Rows, rows of an image, numbers of a row."""
    width = x.shape[-1]
    return x.shape[:-1].numel(), x.shape[1:-1].numel(), width


def grad_programs(rows: int, tiles: int) -> int:
    """Programs that share the rows of a gradient: each leaves partial sums as large as a row or more."""
    return max(1, min(tiles, GRAD_PROGRAMS, rows // ROWS_A_PROGRAM))
