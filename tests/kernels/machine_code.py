"""What does the machine code of a Triton kernel for sm_90 hold? Compiled offline, no GPU is needed.

Compiles with the assembler that Triton brings along and reads the code back.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.kernels.dcnv3_launch import COMPILE_OPTIONS


@dataclass(frozen=True)
class Code:
    registers: int  # of one thread
    stack: int  # bytes
    operations: tuple[str, ...]  # in order, with their modifiers
    jumps: dict[int, int]  # place of a branch -> where it goes
    end: int  # place behind the last instruction that counts

    @property
    def spills(self) -> int:
        """Loads and stores of local memory, and bytes of stack."""
        return self.stack + self.count("LDL") + self.count("STL")

    @property
    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each."""
        return sorted((target, source) for source, target in self.jumps.items() if target < source)

    @property
    def atomics(self) -> int:
        """Instructions that add to memory in an order that changes from run to run."""
        return self.count("ATOM", "ATOMG", "ATOMS", "RED", "REDG")

    def count(self, *names: str) -> int:
        return sum(operation.split(".")[0] in names for operation in self.operations)


def compile_kernel(
    kernel: Any,
    constants: Mapping[str, object],
    dtype: str,
    warps: int,
    wide: tuple[str, ...] = (),
    divisible: tuple[str, ...] = (),
) -> Code:
    """`dtype` is that of all pointers but `wide` ones, which are float32; `divisible` numbers are multiples of 16,
    which Triton sees by itself when it compiles for a call.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        is_pointer = argument.endswith("_pointer")
        signature[argument] = "i32" if not is_pointer else "*fp32" if argument in wide else f"*{dtype}"
        if is_pointer or argument in divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    options = {"num_warps": warps} | COMPILE_OPTIONS
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return _read(built.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")


def _read(cubin: bytes, tools: Path) -> Code:
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
            operations.append(found[1])
    jumps = {source: labels[label] for source, label in targets.items() if labels[label] != source}
    end = min((s for s, label in targets.items() if labels[label] == s), default=len(operations))
    return Code(registers, stack, tuple(operations), jumps, end)


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
