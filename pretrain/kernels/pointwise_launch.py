"""How are the Triton kernels around DCNv3 launched? It follows from the shape.

The numbers are the best of benchmarks/tune_gpu.py on an H200, bfloat16, 64 images of InternImage-H at 192 px; none
spills registers (tests/kernels/test_pointwise_sass.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import Tensor

from pretrain.kernels.dcnv3_launch import ceil_div

NUMBERS = 1024  # that one program of an elementwise kernel takes
HELD = 32  # bytes of every tensor that a thread of a kernel of whole rows holds
MAX_WARPS = 16
GRAD_PROGRAMS = 1024  # at most, of a gradient: 8 on each of the 132 processors of an H200
ROWS_A_PROGRAM = 4  # at least, of a gradient
SUM_PROGRAMS = 1024  # of a sum over rows, about
CONVOLUTION_WARPS, TAP_WARPS = 4, 2
TAP_PROGRAMS = 2048  # of the taps' gradient, about


@dataclass(frozen=True)
class Rows:
    """Launch of a kernel that owns whole rows of channels."""

    rows: int  # power of 2
    channels: int  # power of 2, holds a row
    warps: int


def power_of_2(number: int) -> int:
    """The least that is not below a positive number."""
    return 1 << (number - 1).bit_length()


@cache
def rows_launch(width: int, itemsize: int) -> Rows:
    """HELD bytes of every tensor a thread, as far as warps suffice."""
    channels = power_of_2(width)
    rows = max(1, 1024 // channels)
    return Rows(rows, channels, warps=min(rows * channels * itemsize // (32 * HELD), MAX_WARPS))


@dataclass(frozen=True)
class Tile:
    """Launch of a depth-wise kernel."""

    runs: int  # of four columns each; power of 2
    channels: int  # power of 2 that divides the map's channels
    warps: int


@cache
def tile_launch(channels: int, itemsize: int, warps: int) -> Tile:
    """Four columns a thread; up to 64 channels, as many as divide the map's. `warps` share 1024 bytes of a column."""
    part = min(channels & -channels, 64)
    return Tile(1024 // itemsize // part, part, warps)


@dataclass(frozen=True)
class Sum:
    """Launch of the sum over rows."""

    rows: int  # that a program adds at a time; power of 2
    channels: int  # power of 2
    warps: int
    programs: int  # runs of rows


@cache
def sum_launch(rows: int, width: int, itemsize: int) -> Sum:
    """Lines of 128 bytes, and about SUM_PROGRAMS programs in all."""
    channels = min(128 // itemsize, power_of_2(width))
    programs = max(1, min(ceil_div(rows, 64), SUM_PROGRAMS // ceil_div(width, channels)))
    return Sum(32, channels, 8, programs)


def row_counts(x: Tensor) -> tuple[int, int, int]:
    """Rows, rows of an image, numbers of a row."""
    width = x.shape[-1]
    return x.shape[:-1].numel(), x.shape[1:-1].numel(), width


def grad_programs(rows: int, tiles: int) -> int:
    """Programs that share the rows of a gradient: each leaves partial sums as large as a row or more."""
    return max(1, min(tiles, GRAD_PROGRAMS, rows // ROWS_A_PROGRAM))
