"""Which DCNv3 runs on this device, is it right, and how fast is it?

    python -m pretrain.kernels [--device cuda] [--dtype bfloat16] [--path compiled] [--quick]

Prints the path and the reason for every kind of shape, compares each path that is used with the float64
reference, forward and backward, and times it; then the steps around the operator. Exits with 1 if one
differs, or does not repeat although it should: every path but the compiled one gives the same bits again.
With --quick, two kinds and one timing: seconds on a CPU, for a health check. A device whose memory a run fills cannot
be asked; the health check then says so and asks the CPU.
"""

from __future__ import annotations

import argparse
import sys

import torch

from pretrain import provenance
from pretrain.kernels.check import KINDS, LIMITS, Kind, check, pass_seconds
from pretrain.kernels.check_steps import STEPS, check_step
from pretrain.kernels.dcnv3 import FUSED, PATHS
from pretrain.kernels.dcnv3_choice import Choice, compiler_obstacle

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in LIMITS}
ROUNDS = 5  # timings of each pass; the median counts
QUICK = ("H stage 4", "T stage 1")  # both group widths of the fused kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--path", choices=[*PATHS, FUSED], help="this one in place of the chosen")
    parser.add_argument("--quick", action="store_true", help="two kinds and one timing, for a health check")
    arguments = parser.parse_args()
    try:
        check_device(known_device(arguments.device), arguments)
    except RuntimeError as error:
        if not is_full(error):
            raise
        if not arguments.quick:
            sys.exit(
                f"--device {arguments.device} has no memory left: end what fills it, or say --device cpu"
            )
        print(f"{arguments.device} has no memory left, as while a run fills it: the CPU is checked instead")
        check_device(torch.device("cpu"), arguments)


def is_full(error: RuntimeError) -> bool:
    """Does an error of torch say that the device has no memory left, for a tensor or for a context?"""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def check_device(device: torch.device, arguments: argparse.Namespace) -> None:
    """Prints a line for every kind and step; ends the process where one differs."""
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    kinds = {name: kind for name, kind in KINDS.items() if name in QUICK or not arguments.quick}
    rounds = 1 if arguments.quick else ROUNDS
    print(f"DCNv3 on {provenance.hardware(device)}, {dtype}, errors below {LIMITS[dtype]:.0e} wanted")
    results = [line(name, kind, device, dtype, arguments.path, rounds) for name, kind in kinds.items()]
    results = [result for result in results if result is not None]
    results += [step_line(name, device, dtype, rounds) for name in STEPS]
    if arguments.path == FUSED and len(results) == len(STEPS):
        sys.exit(
            f"the path {FUSED} serves no kind here, so nothing of DCNv3 was checked: see the reasons above"
        )
    if not all(results):
        sys.exit(
            f"{results.count(False)} of {len(results)} kinds differ from the reference: see DIFFERS above"
        )


def known_device(name: str) -> torch.device:
    """The device of that name; ends the process with a plain word when it is not there, unless it is full."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if isinstance(error, RuntimeError) and is_full(error):
            raise
        sys.exit(f"--device {name} cannot be used here: {str(error).splitlines()[0]}")
    return device


def line(
    name: str, kind: Kind, device: torch.device, dtype: torch.dtype, path: str | None, rounds: int
) -> bool | None:
    """Prints what one kind of call does here; whether it passes, None if the path does not serve it."""
    if path == FUSED and kind.choice(device, dtype).path != FUSED:
        print(f"{name:16s} not served by the path {path}: {kind.choice(device, dtype).reason}")
        return None
    if path == "compiled" and (obstacle := compiler_obstacle(device.type)):
        sys.exit(f"--path {path} cannot run here: {obstacle}")
    choice = Choice(path, "asked for") if path else kind.choice(device, dtype)
    report = check(kind, device, dtype, choice.path)
    forward, both = pass_seconds(kind, device, dtype, choice.path, rounds)
    must_repeat = choice.path != "compiled"  # on a GPU its gradients are atomic sums
    passes = report.is_close(dtype) and (report.is_repeatable or not must_repeat)
    size = f"{kind.images} x {kind.side} x {kind.side} x {kind.groups * kind.group_width}"
    print(
        f"{name:16s} {size:20s} {choice.path:9s} {'equal' if passes else 'DIFFERS':7s} "
        f"error {report.largest:.0e}{'' if report.is_repeatable else ', not repeatable'}, "
        f"forward {forward * 1e3:.2f} ms, with backward {both * 1e3:.2f} ms: {choice.reason}"
    )
    return passes


def step_line(name: str, device: torch.device, dtype: torch.dtype, rounds: int) -> bool:
    """Prints what one of the steps around the operator does here; whether it passes."""
    report, forward, both = check_step(name, device, dtype, rounds)
    passes = report.is_close(dtype) and report.is_repeatable
    print(
        f"{name:37s} {report.path:9s} {'equal' if passes else 'DIFFERS':7s} error {report.largest:.0e}"
        f"{'' if report.is_repeatable else ', not repeatable'}, forward {forward * 1e3:.2f} ms, with backward "
        f"{both * 1e3:.2f} ms: {report.reason}"
    )
    return passes


if __name__ == "__main__":
    main()
