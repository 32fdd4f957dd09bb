"""Which implementation of DCNv3 serves a call on this machine, and why? The only place that decides."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from dataclasses import dataclass
from functools import cache

import torch

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED_GROUP_WIDTHS = (16, 32)  # channels of one group in every published size
FUSED_CAPABILITY = (8, 0)  # NVIDIA: bfloat16 on tensor cores


@dataclass(frozen=True)
class Call:
    """What the choice depends on; `options` are those of `dcnv3`."""

    device_type: str
    dtype: torch.dtype
    group_width: int  # channels of one group
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    remove_center: bool = False
    is_packed: bool = True  # offsets, mask logits and centre scale come, or can come, as packed rows


@dataclass(frozen=True)
class Choice:
    path: str  # reference, sparse, compiled or triton
    reason: str


def choose_path(call: Call) -> Choice:
    """The implementation for a call; announced in the log once a process.

    float64 is for proofs (gradcheck needs double backward): reference. A CPU takes the sparse path. Elsewhere
    Triton where it serves the call, then the compiled gather, then the sparse path where nothing compiles.
    """
    choice = _choose(call)
    if not torch.compiler.is_compiling():
        announce("DCNv3", call.device_type, call.dtype, choice)
    return choice


def _choose(call: Call) -> Choice:
    if call.dtype == torch.float64:
        return Choice("reference", "float64 is for proofs")
    if call.device_type == "cpu":
        return Choice("sparse", "the fastest plain-torch path on a CPU (benchmarks/dcnv3_cpu.py)")
    obstacle = _option_obstacle(call) or triton_obstacle(call.device_type)
    if obstacle is None:
        return Choice("triton", "the fused kernels serve this device, dtype, group width and these options")
    no_compiler = compiler_obstacle(call.device_type)
    if no_compiler is None:
        return Choice("compiled", f"no fused kernels: {obstacle}")
    return Choice("sparse", f"no fused kernels: {obstacle}; no torch.compile: {no_compiler}")


def _option_obstacle(call: Call) -> str | None:
    """Which part of the call the fused kernels do not serve; None if they serve it."""
    served = {
        "dtype": (call.dtype, FUSED_DTYPES),
        "group width": (call.group_width, FUSED_GROUP_WIDTHS),
        "kernel_size": (call.kernel_size, (3,)),
        "stride": (call.stride, (1,)),
        "padding": (call.padding, (1,)),
        "dilation": (call.dilation, (1,)),
        "remove_center": (call.remove_center, (False,)),
        "packed rows": (call.is_packed, (True,)),
    }
    for name, (found, wanted) in served.items():
        if found not in wanted:
            return f"{name} {found} is not among {', '.join(map(str, wanted))}"
    return None


@torch.compiler.assume_constant_result
def triton_obstacle(device_type: str) -> str | None:
    """Why Triton kernels cannot run on this kind of device; None if they can."""
    return _triton_obstacle(device_type)


@torch.compiler.assume_constant_result
def compiler_obstacle(device_type: str) -> str | None:
    """Why torch.compile cannot build kernels for this kind of device; None if it can."""
    return _compiler_obstacle(device_type)


@cache
def _triton_obstacle(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    if device_type == "cpu":
        # Only the interpreter of Triton runs there, for tests.
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "Triton has no CPU backend"
    if device_type not in ("cuda", "xpu"):
        return f"Triton has no backend for {device_type}"
    if device_type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < FUSED_CAPABILITY:
            return f"compute capability {capability} is below {FUSED_CAPABILITY}"
    return _missing_program("CC", ("clang", "gcc", "cc"), "Triton builds its launcher with a C compiler")


@cache
def _compiler_obstacle(device_type: str) -> str | None:
    if device_type == "cpu":
        return _missing_program("CXX", ("g++", "clang++", "c++"), "torch.compile writes C++ for a CPU")
    if device_type not in ("cuda", "xpu"):
        return f"torch.compile is not used on {device_type}"
    return _triton_obstacle(device_type)  # torch.compile writes Triton for a GPU


def _missing_program(variable: str, names: tuple[str, ...], purpose: str) -> str | None:
    wanted = [os.environ[variable]] if os.environ.get(variable) else list(names)
    if any(shutil.which(name) for name in wanted):
        return None
    return f"{purpose}, and none of {', '.join(wanted)} is there: install one, or name it in ${variable}"


@cache
def announce(what: str, device_type: str, dtype: torch.dtype, choice: Choice) -> None:
    """Tells the log which path serves, once a process."""
    logging.getLogger(__name__).info(
        "%s on %s in %s: %s path (%s)", what, device_type, dtype, choice.path, choice.reason
    )
