"""How many instructions, registers and spills do the Triton kernels of DCNv3 have on sm_90? No GPU is needed.

python tests/kernels/sass.py        # every dtype and group width: a minute or two
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from pretrain.kernels.dcnv3_launch import (  # noqa: E402
    PRODUCTS,
    Gather,
    Launch,
    Product,
    default_launch,
)
from tests.kernels.machine_code import Code, compile_kernel  # noqa: E402

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
KERNELS = ("sample", "grad_packed", "grad_value_atomic", "reach", "small", "medium", "large")


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is shipped; `kernel` is one of KERNELS, the last three are tiles of grad_value."""

    kernel: str
    dtype: str
    group_width: int

    @property
    def launch(self) -> Launch:
        return default_launch(1, 1, self.group_width, BYTES[self.dtype])

    @property
    def tile(self) -> Gather | Product:
        small, medium, large = PRODUCTS[BYTES[self.dtype]]
        products = {"small": small, "medium": medium, "large": large, "reach": replace(large, warps=1)}
        return products[self.kernel] if self.kernel in products else getattr(self.launch, self.kernel)


@dataclass(frozen=True)
class Machine:
    """What the machine code of one kernel holds."""

    registers: int  # of one thread
    spills: int  # loads and stores of local memory, and bytes of stack
    shared_barriers: int
    instructions: int  # of one warp, outside the loop
    loop: int  # of one warp, in one round of the loop that does its work
    skipped_loop: int  # in one round that is skipped
    matrix_products: int  # instructions of the tensor cores
    atomics: int  # instructions that add to memory


def compile_all(configurations: list[Configuration]) -> dict[Configuration, Machine]:
    """Two at a time, each in a fresh process: no test's import hook touches the kernels' source."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(configurations, pool.map(compile_one, configurations), strict=True))


def compile_one(configuration: Configuration) -> Machine:
    from pretrain.kernels import triton_gather, triton_scatter

    name = configuration.kernel if configuration.kernel not in ("small", "medium", "large") else "grad_value"
    kernel = getattr(triton_gather, f"{name}_kernel", None) or getattr(triton_scatter, f"{name}_kernel")
    wide = ("reach_pointer",) + (("grad_value_pointer",) if name == "grad_value_atomic" else ())
    code = compile_kernel(
        kernel, _constants(configuration), configuration.dtype, configuration.tile.warps, wide
    )
    return _count(code)


def _constants(configuration: Configuration) -> dict[str, object]:
    tile = configuration.tile
    constants = {"OFFSET_SCALE": 1.0}
    if configuration.kernel != "reach":
        constants |= {"GROUP_WIDTH": configuration.group_width, "HAS_SCALE": True}
    if isinstance(tile, Gather):
        return constants | {"POSITIONS": tile.positions}
    constants |= {"QUERY_ROWS": tile.query_rows, "QUERY_COLUMNS": tile.query_columns}
    if configuration.kernel == "reach":
        return constants
    precision = "tf32x3" if configuration.dtype == "fp32" else "ieee"
    return constants | {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "IS_BANDED": tile.is_banded, "PRECISION": precision
    }  # fmt: skip


def _count(code: Code) -> Machine:
    assert len(code.loops) <= 1, f"{len(code.loops)} loops: instructions a loop cannot be told"
    first, last = code.loops[0] if code.loops else (0, -1)
    forward = [
        min(target, last) - source
        for source, target in code.jumps.items()
        if first <= source <= min(last, target - 1)
    ]
    loop = last - first + 1
    return Machine(
        code.registers, code.spills, code.count("BAR"), code.end - loop, loop,
        loop - max(forward, default=0) if code.loops else 0, code.count("HMMA", "HGMMA"), code.atomics,
    )  # fmt: skip


def per_element(
    machine: Machine, configuration: Configuration, images: int, height: int, width: int, groups: int,
    offset_limit: float,
) -> float:  # fmt: skip
    """Warp instructions that the whole launch issues, over the elements of [images, height, width, channels].

    Every warp of every program counts, with idle lanes at the borders, and every round of the loop. Tiles are
    hit or skipped as if all offsets reached `offset_limit` pixels to both sides. Both sides of a branch other
    than that one count: an upper bound.
    """
    tile, elements = configuration.tile, images * height * width * groups * configuration.group_width
    if isinstance(tile, Gather):
        programs = -(-images * height * width // tile.positions) * groups
        return machine.instructions * programs * tile.warps / elements
    if configuration.kernel == "reach":
        programs = len(_starts(height, tile.query_rows)) * len(_starts(width, tile.query_columns))
        return machine.instructions * programs * groups * images * tile.warps / elements
    total = 0
    for row in _starts(height, tile.rows):
        for column in _starts(width, tile.columns):
            if tile.is_banded:
                rounds = len(_starts(height, tile.query_rows)) * len(_starts(width, tile.query_columns))
                hits = _hits(height, row, tile.rows, tile.query_rows, offset_limit) * _hits(
                    width, column, tile.columns, tile.query_columns, offset_limit
                )
            else:
                rounds = hits = -(-height * width // (tile.query_rows * tile.query_columns))
            total += machine.instructions + hits * machine.loop + (rounds - hits) * machine.skipped_loop
    return total * groups * images * tile.warps / elements


def _starts(size: int, step: int) -> range:
    return range(0, size, step)


def _hits(size: int, start: int, length: int, query: int, offset_limit: float) -> int:
    """Tiles of sampling positions along one axis that touch the tile [start, start + length)."""
    reach = 1 + offset_limit
    return sum(
        first - reach < start + length and min(first + query, size) - 1 + reach > start - 1
        for first in _starts(size, query)
    )


def main() -> None:
    configurations = [Configuration(k, d, g) for d in BYTES for g in (32, 16) for k in KERNELS]
    for configuration, machine in compile_all(configurations).items():
        print(configuration, machine, flush=True)


if __name__ == "__main__":
    main()
