"""How many instructions, registers and spills do the Triton kernels of DCNv3 have on sm_90? No GPU is needed.

    python tests/kernels/sass.py        # every dtype and group width: a minute or two

Compiles offline with the assembler that Triton brings along and reads the machine code back.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from pretrain.kernels.dcnv3_launch import (  # noqa: E402
    COMPILE_OPTIONS,
    PRODUCTS,
    Gather,
    Launch,
    Product,
    default_launch,
)

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


def compile_all(configurations: list[Configuration]) -> dict[Configuration, Machine]:
    """Two at a time, each in a fresh process: no test's import hook touches the kernels' source."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(configurations, pool.map(compile_one, configurations), strict=True))


def compile_one(configuration: Configuration) -> Machine:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pretrain.kernels import triton_gather, triton_scatter

    name = configuration.kernel if configuration.kernel not in ("small", "medium", "large") else "grad_value"
    kernel = getattr(triton_gather, f"{name}_kernel", None) or getattr(triton_scatter, f"{name}_kernel")
    constants = _constants(configuration)
    wide = {"reach_pointer"} | ({"grad_value_pointer"} if name == "grad_value_atomic" else set())
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_pointer"):
            signature[argument] = "*fp32" if argument in wide else f"*{configuration.dtype}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    options = {"num_warps": configuration.tile.warps} | COMPILE_OPTIONS
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return _read(built.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")


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


def _read(cubin: bytes, tools: Path) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    operations, targets, labels = [], {}, {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)", line):
            if target := re.search(r"`\((\.L_x_\d+)\)", found[2]) if found[1].startswith("BRA") else None:
                targets[len(operations)] = target[1]
            operations.append(found[1].split(".")[0])
    jumps = {source: labels[label] for source, label in targets.items() if labels[label] != source}
    end = min((s for s, label in targets.items() if labels[label] == s), default=len(operations))
    backward = [(target, source) for source, target in jumps.items() if target < source]
    assert len(backward) <= 1, f"{len(backward)} loops: instructions a loop cannot be told"
    first, last = backward[0] if backward else (0, -1)
    forward = [
        min(target, last) - source
        for source, target in jumps.items()
        if first <= source <= min(last, target - 1)
    ]
    loop = last - first + 1
    spills = stack + operations.count("LDL") + operations.count("STL")
    products = sum(operation in ("HMMA", "HGMMA") for operation in operations)
    return Machine(
        registers, spills, operations.count("BAR"), end - loop, loop,
        loop - max(forward, default=0) if backward else 0, products,
    )  # fmt: skip


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


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
