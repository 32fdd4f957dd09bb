"""What does the machine code of a Triton kernel for sm_90 hold? Compiled offline, no GPU is needed.

Compiles with the assembler that Triton brings along and reads the code back.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.kernels.dcnv3_launch import COMPILE_OPTIONS

INSTRUCTION_BYTES = 16
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)")


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
) -> bytes:
    """The machine code, as a cubin.

    `dtype` is that of all pointers but `wide` ones, which are float32; `divisible` numbers are multiples of 16, which
    Triton sees by itself when it compiles for a call.
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
    return built.asm["cubin"]


def read_codes(cubins: Sequence[bytes]) -> list[Code]:
    """What those hold. All are disassembled at once: a start of nvdisasm takes longer than a hundred kernels."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    texts, usages = [_instructions(cubin) for cubin in cubins], []
    with tempfile.NamedTemporaryFile() as file:
        for cubin in cubins:
            Path(file.name).write_bytes(cubin)
            usages.append(_run(tools / "cuobjdump", "-res-usage", file.name))
        Path(file.name).write_bytes(b"".join(texts))
        lines = _run(tools / "nvdisasm", "--binary", "SM90a", file.name).splitlines()
    instructions = [found for line in lines if (found := INSTRUCTION.match(line))]
    assert len(instructions) * INSTRUCTION_BYTES == sum(map(len, texts))
    codes, first = [], 0
    for text, usage in zip(texts, usages, strict=True):
        last = first + len(text) // INSTRUCTION_BYTES
        codes.append(_code(instructions[first:last], first, usage))
        first = last
    return codes


def _code(instructions: Sequence[re.Match[str]], first: int, usage: str) -> Code:
    """Of the instructions of one kernel, whose first is number `first` of all."""
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    branches = {}
    for place, (operation, operands) in enumerate(found.groups() for found in instructions):
        if target := re.search(r"0x([0-9a-f]+)\s*;", operands) if operation.startswith("BRA") else None:
            branches[place] = int(target[1], 16) // INSTRUCTION_BYTES - first
    jumps = {source: target for source, target in branches.items() if source != target}
    end = min(branches.keys() - jumps.keys(), default=len(instructions))  # behind it is filling
    return Code(registers, stack, tuple(found[1] for found in instructions), jumps, end)


def _instructions(cubin: bytes) -> bytes:
    """Those of its only kernel: the ELF section .text.NAME."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * index) for index in range(count)]
    start_of_names = sections[names][4]
    (found,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", start_of_names + name)
    )
    return found


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
