"""Which DCNv3 runs on this device, is it right, and how fast is it?

    python -m pretrain.kernels [--device cuda] [--dtype bfloat16] [--path compiled]

Prints the path and the reason for every kind of shape, compares each path that is used with the float64
reference, forward and backward, and times it. Exits with 1 if one differs, or does not repeat although it
should: every path but the compiled one gives the same bits again.
"""

from __future__ import annotations

import argparse
import sys

import torch

from pretrain import provenance
from pretrain.kernels.check import KINDS, LIMITS, Kind, check, pass_seconds
from pretrain.kernels.dcnv3 import FUSED, PATHS
from pretrain.kernels.dcnv3_choice import Choice

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in LIMITS}
ROUNDS = 5  # timings of each pass; the median counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--path", choices=[*PATHS, FUSED], help="this one in place of the chosen")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    print(f"DCNv3 on {provenance.hardware(device)}, {dtype}, errors below {LIMITS[dtype]:.0e} wanted")
    results = [line(name, kind, device, dtype, arguments.path) for name, kind in KINDS.items()]
    if not all(results):
        sys.exit(
            f"{results.count(False)} of {len(results)} kinds differ from the reference: see DIFFERS above"
        )


def line(name: str, kind: Kind, device: torch.device, dtype: torch.dtype, path: str | None) -> bool:
    """Prints what one kind of call does here; whether it passes."""
    if path == FUSED and kind.choice(device, dtype).path != FUSED:
        print(f"{name:16s} not served by the path {path}")
        return True
    choice = Choice(path, "asked for") if path else kind.choice(device, dtype)
    report = check(kind, device, dtype, choice.path)
    forward, both = pass_seconds(kind, device, dtype, choice.path, ROUNDS)
    must_repeat = choice.path != "compiled"  # on a GPU its gradients are atomic sums
    passes = report.is_close(dtype) and (report.is_repeatable or not must_repeat)
    size = f"{kind.images} x {kind.side} x {kind.side} x {kind.groups * kind.group_width}"
    print(
        f"{name:16s} {size:20s} {choice.path:9s} {'equal' if passes else 'DIFFERS':7s} "
        f"error {max(report.errors.values()):.0e}{'' if report.is_repeatable else ', not repeatable'}, "
        f"forward {forward * 1e3:.2f} ms, with backward {both * 1e3:.2f} ms: {choice.reason}"
    )
    return passes


if __name__ == "__main__":
    main()
