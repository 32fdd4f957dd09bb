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
from tests.kernels.machine_code import Code, compile_kernel, read_codes  # noqa: E402

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
ARRANGED = ("arrange", "arrange_banded")
KERNELS = ("sample", "grad_packed", "grad_value_atomic", *ARRANGED, "small", "medium", "large")


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is shipped; `kernel` is one of KERNELS, the last three are tiles of grad_value, and
    the two before them what lays the rows out for these.
    """

    kernel: str
    dtype: str
    group_width: int

    @property
    def launch(self) -> Launch:
        return default_launch(1, 1, self.group_width, BYTES[self.dtype])

    @property
    def tile(self) -> Gather | Product:
        small, medium, large = PRODUCTS[BYTES[self.dtype]]
        products = {"small": small, "medium": medium, "large": large}
        products |= {"arrange": replace(medium, warps=1), "arrange_banded": replace(large, warps=1)}
        return products[self.kernel] if self.kernel in products else getattr(self.launch, self.kernel)


@dataclass(frozen=True)
class Machine:
    """What the machine code of one kernel holds."""

    registers: int  # of one thread
    spills: int  # loads and stores of local memory, and bytes of stack
    shared_barriers: int
    instructions: int  # of one warp, outside the loop
    loop: int  # of one warp, in one round of the loop that does its work
    matrix_products: int  # instructions of the tensor cores
    atomics: int  # instructions that add to memory


def compile_all(configurations: list[Configuration]) -> dict[Configuration, Machine]:
    """In a fresh process: no test's import hook touches the kernels' source."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        codes = read_codes(list(pool.map(compile_one, configurations)))
    return dict(zip(configurations, map(_count, codes), strict=True))


def compile_one(configuration: Configuration) -> bytes:
    from pretrain.kernels import triton_gather, triton_scatter

    owners = {
        "small": "grad_value",
        "medium": "grad_value",
        "large": "grad_value",
        "arrange_banded": "arrange",
    }
    name = owners.get(configuration.kernel, configuration.kernel)
    kernel = getattr(triton_gather, f"{name}_kernel", None) or getattr(triton_scatter, f"{name}_kernel")
    wide = ("arranged_pointer", "reach_pointer") + (
        ("grad_value_pointer",) if name == "grad_value_atomic" else ()
    )
    return compile_kernel(
        kernel, _constants(configuration), configuration.dtype, configuration.tile.warps, wide
    )


def _constants(configuration: Configuration) -> dict[str, object]:
    tile = configuration.tile
    constants: dict[str, object] = {"HAS_SCALE": True}
    if isinstance(tile, Gather):
        return constants | {
            "GROUP_WIDTH": configuration.group_width, "OFFSET_SCALE": 1.0, "SAMPLES": tile.samples
        }  # fmt: skip
    constants |= {"QUERY_ROWS": tile.query_rows, "QUERY_COLUMNS": tile.query_columns}
    constants["IS_BANDED"] = tile.is_banded
    if configuration.kernel in ARRANGED:
        return constants | {"OFFSET_SCALE": 1.0}
    precision = "tf32x3" if configuration.dtype == "fp32" else "ieee"
    return constants | {
        "GROUP_WIDTH": configuration.group_width, "ROWS": tile.rows, "COLUMNS": tile.columns,
        "PRECISION": precision,
    }  # fmt: skip


def _count(code: Code) -> Machine:
    """The loop that does the work is the innermost; one around it, over chunks of tiles, counts as once."""
    inner = [
        (first, last) for first, last in code.loops if not any(first < f and s < last for f, s in code.loops)
    ]
    assert len(inner) <= 1, f"{len(inner)} loops side by side: instructions a loop cannot be told"
    first, last = inner[0] if inner else (0, -1)
    loop = last - first + 1
    return Machine(
        code.registers, code.spills, code.count("BAR"), code.end - loop, loop,
        code.count("HMMA", "HGMMA"), code.atomics,
    )  # fmt: skip


def per_element(
    machine: Machine, configuration: Configuration, images: int, height: int, width: int, groups: int,
    offset_limit: float,
) -> float:  # fmt: skip
    """Warp instructions that the whole launch issues, over the elements of [images, height, width, channels].

    Every warp of every program counts, with idle lanes at the borders, and every round of the loop. Tiles are
    hit as if all offsets reached `offset_limit` pixels to both sides; maps of up to 128 tiles. Both sides of a
    branch count: an upper bound.
    """
    tile, elements = configuration.tile, images * height * width * groups * configuration.group_width
    if isinstance(tile, Gather):
        programs = -(-images * height * width * groups // tile.samples)
        return machine.instructions * programs * tile.warps / elements
    if configuration.kernel in ARRANGED:
        programs = len(_starts(height, tile.query_rows)) * len(_starts(width, tile.query_columns))
        return machine.instructions * programs * groups * images * tile.warps / elements
    total = 0
    for row in _starts(height, tile.rows):
        for column in _starts(width, tile.columns):
            if tile.is_banded:
                hits = _hits(height, row, tile.rows, tile.query_rows, offset_limit) * _hits(
                    width, column, tile.columns, tile.query_columns, offset_limit
                )
            else:
                hits = -(-height * width // (tile.query_rows * tile.query_columns))
            total += machine.instructions + hits * machine.loop
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
