"""How fast is fused DCNv3 on a GPU, at the stages of InternImage-H at 192 px, and how far from the memory's limit?

    python benchmarks/dcnv3_gpu.py [--batch 64] [--dtype bfloat16] [--only fused]

Per stage, forward and forward + backward: the fused kernels (deterministic and atomic), the compiled gather, and
the published CUDA operator where its package `DCNv3` is importable (in float16, the only narrow type it has, with
softmax and blend in torch). The bandwidth bound counts every operand once, at the rate that a copy reaches in the
same run. Checks each stage against the float64 reference first. Writes benchmarks/results/dcnv3_gpu.json,
or dcnv3_gpu_fused.json with the fused kernels alone; without a GPU it measures and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import gpu, keep
from pretrain import provenance
from pretrain.kernels.check import KINDS, Kind, check, inputs, pass_seconds, seconds
from pretrain.kernels.packed_row import COLUMNS, unpack

STAGES = {name: kind for name, kind in KINDS.items() if name.startswith("H stage")}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COPIED = 2**30  # bytes of the copy that tells the memory's rate
PASSES = ("forward", "forward_and_backward")


def moved_bytes(kind: Kind, itemsize: int) -> dict[str, int]:
    """Least traffic of each pass: every operand read or written once."""
    positions = kind.images * kind.side**2 * kind.groups
    value, packed = positions * kind.group_width * itemsize, positions * COLUMNS * itemsize
    forward = 2 * value + packed  # reads value and packed rows, writes the output
    backward = 3 * value + 2 * packed  # reads both and the output's gradient, writes two gradients
    return {"forward": forward, "forward_and_backward": forward + backward}


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a device-to-device copy reads and writes."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / seconds(lambda: target.copy_(source), device)


def published_operator() -> Callable[..., Tensor] | None:
    """(value, offset, mask, groups) -> out by the published CUDA extension, None where it is not importable."""
    if importlib.util.find_spec("DCNv3") is None:
        return None
    extension = importlib.import_module("DCNv3")
    last = (False,) if float(version("DCNv3")) > 1.0 else ()  # remove_center came with 1.1

    class Published(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
            ctx.save_for_backward(value, offset, mask)
            ctx.sizes = (3, 3, 1, 1, 1, 1, 1, 1, groups, value.shape[3] // groups, 1.0)
            ctx.step = min(len(value), 256)
            return extension.dcnv3_forward(value, offset, mask, *ctx.sizes, ctx.step, *last)

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
            gradients = extension.dcnv3_backward(
                *ctx.saved_tensors, *ctx.sizes, grad.contiguous(), ctx.step, *last
            )
            return *gradients, None

    return Published.apply


def published_seconds(
    kind: Kind, device: torch.device, operator: Callable[..., Tensor]
) -> tuple[float, float]:
    """Forward, and forward and backward, of the published operator between softmax and blend, in float16."""
    value, packed, grad = inputs(kind, device, torch.float16)
    offset, logits, scale = (tensor.contiguous() for tensor in unpack(packed))
    leaves = [leaf.requires_grad_() for leaf in (value, offset, logits, scale)]

    def forward() -> Tensor:
        mask = F.softmax(logits, -1, dtype=torch.float32).half().flatten(-2)
        sampled = operator(value, offset, mask, kind.groups)
        share = scale.sigmoid().repeat_interleave(kind.group_width, -1)
        return sampled * (1 - share) + value * share

    def without_gradient() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    return seconds(without_gradient, device), seconds(both, device)


def measure(
    kind: Kind,
    device: torch.device,
    dtype: torch.dtype,
    rate: float,
    published: Callable[..., Tensor] | None,
    *,
    is_whole: bool = True,
) -> dict[str, dict[str, dict[str, float]]]:
    """Implementation -> pass -> milliseconds, gigabytes a second, share of the bandwidth bound."""
    times = {
        "fused": pass_seconds(kind, device, dtype, "triton"),
        "fused_atomic": pass_seconds(kind, device, dtype, "triton", is_atomic=True),
    }
    if is_whole:
        times["compiled"] = pass_seconds(kind, device, dtype, "compiled")
    if published is not None:
        times["published_float16"] = published_seconds(kind, device, published)
    moved = moved_bytes(kind, dtype.itemsize)
    return {
        implementation: {
            name: {
                "milliseconds": taken * 1e3,
                "gigabytes_per_second": moved[name] / taken / 1e9,
                "share_of_bandwidth_bound": moved[name] / rate / taken,
            }
            for name, taken in zip(PASSES, pair, strict=True)
        }
        for implementation, pair in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--only", choices=["fused"], help="leave the compiled path out: minutes of compiling")
    arguments = parser.parse_args()
    device, dtype = gpu(), DTYPES[arguments.dtype]
    rate, published = copy_rate(device), published_operator()
    print(f"{provenance.hardware(device)}: a copy moves {rate / 1e9:.0f} GB/s")
    if published is None:
        print("the published CUDA operator (package DCNv3) is not importable: left out")
    stages = {}
    for name, kind in STAGES.items():
        report = check(kind, device, dtype, "triton")
        if not (report.is_close(dtype) and report.is_repeatable):
            sys.exit(f"{name}: the fused kernels fail their check, so no time counts: {report}")
        kind = replace(kind, images=arguments.batch)
        times = measure(kind, device, dtype, rate, published, is_whole=arguments.only is None)
        stages[name] = {"errors": report.errors, "implementations": times}
        for implementation, passes in times.items():
            parts = [
                f"{key} {p['milliseconds']:.3f} ms, {p['gigabytes_per_second']:.0f} GB/s, "
                f"{p['share_of_bandwidth_bound']:.0%} of the bound"
                for key, p in passes.items()
            ]
            print(f"{name} {implementation:18s} {'; '.join(parts)}")
    keep(
        "_".join(["dcnv3_gpu", *filter(None, [arguments.only])]),
        __doc__.splitlines()[0],
        device,
        batch=arguments.batch,
        dtype=arguments.dtype,
        copy_gigabytes_per_second=rate / 1e9,
        stages=stages,
    )


if __name__ == "__main__":
    main()
