"""How are the Triton kernels of DCNv3 launched for a shape? One table, and defaults for the rest.

Where the numbers come from: benchmarks/tune_gpu.py on an H200, bfloat16, 64 images; none spills registers
(tests/kernels/test_dcnv3_sass.py).
"""

from __future__ import annotations

from dataclasses import dataclass

# For every kernel: products and sums in one instruction (no longer Triton's default from 3.10 on), and no
# copies ahead of the loop, which has nothing to wait for that registers could hold.
COMPILE_OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}
SMALL_SIDE = 8  # positions: a map up to here on both sides takes the small tiles
DENSE_POSITIONS = 256  # largest map, in positions, whose tiles are all multiplied; larger ones skip tiles


@dataclass(frozen=True)
class Gather:
    """Samples that one program takes, or whose packed rows it differentiates: one group at one position each."""

    samples: int  # power of 2
    warps: int


@dataclass(frozen=True)
class Product:
    """Tiles of the deterministic gradient of the value: all four numbers are powers of 2."""

    rows: int  # of the tile of the gradient that one program owns
    columns: int
    query_rows: int  # of the tile of sampling positions that is multiplied at a time; 16 positions or more
    query_columns: int
    is_banded: bool  # skip tiles of sampling positions that miss the program's own tile
    warps: int


@dataclass(frozen=True)
class Launch:
    sample: Gather
    grad_packed: Gather
    grad_value: Product
    grad_value_atomic: Gather


SMALL = Product(8, 8, query_rows=8, query_columns=8, is_banded=False, warps=2)
MEDIUM = Product(4, 16, query_rows=4, query_columns=8, is_banded=False, warps=2)
LARGE = Product(4, 8, query_rows=4, query_columns=8, is_banded=True, warps=1)
SMALL_WIDE = Product(4, 8, query_rows=4, query_columns=8, is_banded=False, warps=2)
MEDIUM_WIDE = Product(4, 16, query_rows=4, query_columns=8, is_banded=False, warps=2)
LARGE_WIDE = Product(4, 8, query_rows=4, query_columns=8, is_banded=True, warps=2)
PRODUCTS = {2: (SMALL, MEDIUM, LARGE), 4: (SMALL_WIDE, MEDIUM_WIDE, LARGE_WIDE)}  # by bytes of a number

GATHER = Gather(64, warps=4)
ATOMIC = Gather(32, warps=4)
# (bytes of a number, channels of a group) -> the three kernels that walk over samples
GATHERS = {
    (2, 32): (Gather(32, warps=4), GATHER, ATOMIC),
    (2, 16): (GATHER, GATHER, ATOMIC),
    (4, 32): (GATHER, GATHER, ATOMIC),
    (4, 16): (GATHER, GATHER, ATOMIC),
}

# (height, width, groups, channels of a group, bytes of a number) -> launch, for shapes whose best is not
# default_launch. At the stages of InternImage-H at 192 px it is.
LAUNCHES: dict[tuple[int, int, int, int, int], Launch] = {}


def ceil_div(total: int, part: int) -> int:
    """Parts that cover the total."""
    return -(-total // part)


def launch_for(height: int, width: int, groups: int, group_width: int, itemsize: int) -> Launch:
    """The table's row, or the default by map size, group width and bytes of a number."""
    key = (height, width, groups, group_width, itemsize)
    return LAUNCHES[key] if key in LAUNCHES else default_launch(height, width, group_width, itemsize)


def default_launch(height: int, width: int, group_width: int, itemsize: int) -> Launch:
    small, medium, large = PRODUCTS[itemsize]
    sample, grad_packed, atomic = GATHERS[itemsize, group_width]
    dense = small if max(height, width) <= SMALL_SIDE else medium
    return Launch(sample, grad_packed, dense if height * width <= DENSE_POSITIONS else large, atomic)
