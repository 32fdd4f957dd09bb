"""Which launches of the fused kernels are the fastest on this GPU, at the stages of InternImage-H at 192 px?

    python benchmarks/tune_gpu.py [--batch 64]

Times every candidate from CUDA graphs and prints them, best first. What it finds stands in
pretrain/kernels/dcnv3_launch.py and pointwise_launch.py. Writes benchmarks/results/tune_gpu.json; without a GPU it
measures and writes nothing. Compiles in several processes first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.record import gpu, keep
from pretrain.kernels import dcnv3_launch
from pretrain.kernels.check import KINDS, Kind, inputs
from pretrain.kernels.dcnv3_launch import Gather, Launch, Product, launch_for
from pretrain.kernels.pointwise_launch import Rows, Sum, Tile

STAGES = {name: kind for name, kind in KINDS.items() if name.startswith("H stage")}
PROCESSES = 12  # that compile
GATHERS = [Gather(*pair) for pair in ((32, 2), (32, 4), (64, 4), (64, 8), (128, 4), (128, 8))]
PRODUCTS = [  # rows, columns, query rows and columns, warps
    (4, 8, 4, 8, 1), (4, 8, 4, 8, 2), (8, 8, 4, 8, 1), (8, 8, 4, 8, 2), (8, 8, 4, 8, 4), (4, 16, 4, 8, 1),
    (4, 16, 4, 8, 2), (8, 16, 4, 8, 2), (8, 16, 4, 8, 4), (8, 8, 8, 8, 2), (8, 8, 8, 8, 4), (4, 8, 4, 4, 1),
]  # fmt: skip
ELEMENTS = (512, 1024, 2048)  # at least, of the rows of a program
HELD = (8, 16, 32)  # bytes of every tensor a thread
PROGRAMS = (1024, 2048, 4096)  # of a gradient over rows
SUMS = [  # rows, channels, warps, programs in all
    (16, 64, 4, 2048), (32, 64, 4, 2048), (32, 64, 8, 1024), (16, 128, 4, 2048), (16, 64, 4, 4096),
    (8, 256, 4, 1024),
]  # fmt: skip

Job = tuple[str, str, Callable[[], object]]  # kernel at a stage, candidate, what to time


def dcnv3_jobs(stage: str, kind: Kind, device: torch.device) -> Iterator[Job]:
    from pretrain.kernels import dcnv3_triton

    value, packed, grad = inputs(kind, device, torch.bfloat16)
    key = (kind.side, kind.side, kind.groups, kind.group_width, 2)
    launch = launch_for(*key)
    options = (1.0, True)

    def with_launch(changed: Launch, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with patch.dict(dcnv3_launch.LAUNCHES, {key: changed}):
                return call()

        return run

    for gather in GATHERS:
        name = f"{gather.samples} samples, {gather.warps} warps"
        sample = with_launch(
            replace(launch, sample=gather), lambda: dcnv3_triton.fused_dcnv3(value, packed, *options, False)
        )
        of_packed = with_launch(
            replace(launch, grad_packed=gather),
            lambda: dcnv3_triton.grad_packed(grad, value, packed, *options),
        )
        atomic = with_launch(
            replace(launch, grad_value_atomic=gather),
            lambda: dcnv3_triton.grad_value(grad, packed, *options, True),
        )
        yield f"{stage} sample", name, sample
        yield f"{stage} grad_packed", name, of_packed
        yield f"{stage} grad_value_atomic", name, atomic
    for rows, columns, query_rows, query_columns, warps in PRODUCTS:
        for is_banded in (True, False):
            if not is_banded and kind.side > 24:
                continue
            product = Product(rows, columns, query_rows, query_columns, is_banded, warps)
            yield (
                f"{stage} grad_value",
                str(product),
                with_launch(
                    replace(launch, grad_value=product),
                    lambda: dcnv3_triton.grad_value(grad, packed, *options, False),
                ),
            )


def pointwise_jobs(stage: str, kind: Kind, device: torch.device) -> Iterator[Job]:
    from pretrain.kernels import pointwise_triton, residual_triton

    width = kind.groups * kind.group_width
    x, branch, grad = (
        torch.randn(kind.images, kind.side, kind.side, width, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    outer, following = (torch.randn(2, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    share = torch.ones(kind.images, device=device)
    taps = torch.randn(25, width, device=device, dtype=torch.bfloat16)
    parts = (share, None, outer, following)
    total, _, statistics = residual_triton.residual_norm(x, branch, *parts, 1e-6)
    of_pre = statistics[:2].contiguous()
    channels = 1 << (width - 1).bit_length()

    def with_rows(launch: Rows, programs: int, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with (
                patch.object(residual_triton, "rows_launch", lambda *_: launch),
                patch.object(pointwise_triton, "rows_launch", lambda *_: launch),
                patch("pretrain.kernels.pointwise_launch.GRAD_PROGRAMS", programs),
                patch("pretrain.kernels.pointwise_launch.ROWS_A_PROGRAM", 4),
            ):
                return call()

        return run

    launches = {
        Rows(
            rows := max(1, elements // channels),
            channels,
            max(1, min(rows * channels * 2 // (32 * held), 16)),
        )
        for elements in ELEMENTS
        for held in HELD
    }
    for launch in sorted(launches, key=str):
        name = str(launch)
        forward = with_rows(launch, 0, lambda: residual_triton.residual_norm(x, branch, *parts, 1e-6))
        yield f"{stage} residual_norm", name, forward
        yield (
            f"{stage} layer_norm",
            name,
            with_rows(launch, 0, lambda: residual_triton.layer_norm(x, outer, 1e-6)),
        )
        for programs in PROGRAMS:
            yield (
                f"{stage} residual_norm_grad",
                f"{name} {programs}",
                with_rows(
                    launch,
                    programs,
                    lambda: residual_triton.residual_norm_grad(grad, x, branch, total, statistics, *parts),
                ),
            )
            yield (
                f"{stage} norm_gelu_grad with convolutions",
                f"{name} {programs}",
                with_rows(
                    launch,
                    programs,
                    lambda: pointwise_triton.depthwise_norm_gelu_grad(grad, x, taps, outer[0], outer, of_pre),
                ),
            )
    for runs, part, warps in (
        (16, 64, 4),
        (8, 64, 4),
        (8, 64, 2),
        (32, 64, 8),
        (32, 32, 4),
        (16, 32, 2),
        (4, 64, 1),
    ):
        tile = Tile(runs, part, warps)

        def convolve(tile: Tile = tile) -> Tensor:
            with patch.object(pointwise_triton, "tile_launch", lambda *_: tile):
                return pointwise_triton._convolve(x, taps, outer[0])

        def taps_of(tile: Tile = tile) -> Tensor:
            with patch.object(pointwise_triton, "tile_launch", lambda *_: tile):
                return pointwise_triton._grad_taps(grad, x, taps)

        yield f"{stage} depthwise", str(tile), convolve
        yield f"{stage} taps", str(tile), taps_of
    matrix = grad.flatten(0, 2)
    for rows, part, warps, programs in SUMS:
        launch = Sum(rows, part, warps, max(1, programs // -(-width // part)))

        def summed(launch: Sum = launch) -> Tensor:
            with patch.object(pointwise_triton, "sum_launch", lambda *_: launch):
                return pointwise_triton.column_sum(matrix)

        yield f"{stage} column_sum", str(launch), summed


def jobs(batch: int, device: torch.device) -> Iterator[Job]:
    for stage, kind in STAGES.items():
        kind = replace(kind, images=batch)
        yield from dcnv3_jobs(stage, kind, device)
        yield from pointwise_jobs(stage, kind, device)


def compile_part(part: int, device: torch.device) -> None:
    """Runs every PROCESSES-th candidate once, so that its machine code lies in Triton's cache."""
    for number, (_, _, call) in enumerate(jobs(2, device)):
        if number % PROCESSES == part:
            call()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = gpu()
    if arguments.compile is not None:
        return compile_part(arguments.compile, device)
    helpers = [
        subprocess.Popen([sys.executable, __file__, "--compile", str(part)]) for part in range(PROCESSES)
    ]
    if any(helper.wait() for helper in helpers):
        sys.exit("a candidate does not compile or run: see above")
    from triton.testing import do_bench_cudagraph

    found: dict[str, dict[str, float]] = {}
    for kernel, candidate, call in jobs(arguments.batch, device):
        found.setdefault(kernel, {})[candidate] = round(1e3 * do_bench_cudagraph(call, rep=8), 1)
    for kernel, times in found.items():
        found[kernel] = dict(sorted(times.items(), key=lambda pair: pair[1]))
        best = [f"{time} us: {candidate}" for candidate, time in list(found[kernel].items())[:4]]
        print(f"{kernel}: " + "; ".join(best) + f"; worst {max(times.values())} us")
    keep("tune_gpu", __doc__.splitlines()[0], device, batch=arguments.batch, microseconds=found)


if __name__ == "__main__":
    main()
