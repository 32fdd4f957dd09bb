"""Which plain-torch DCNv3 is the fastest on a CPU, forward and backward?

    OMP_NUM_THREADS=1 python benchmarks/dcnv3_cpu.py --threads 1

Times the sparse path, the reference, both variants of the compiled path, and the common formulation by normalised
grid_sample (written anew; its offset gradients are wrong at integers) in one process, turn about, and keeps the best
of all rounds: ratios hold on a busy machine, milliseconds less so. Writes
benchmarks/results/dcnv3_cpu_<threads>t.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import keep  # noqa: E402
from pretrain.kernels import dcnv3_gather  # noqa: E402
from pretrain.kernels.dcnv3 import PATHS, dcnv3, sampling_points  # noqa: E402

# batch, side, channels, groups: the demo's kind of map, then the four stages of InternImage-H at 192 px.
SHAPES = [
    (16, 16, 64, 4),
    (32, 8, 128, 8),
    (1, 48, 320, 10),
    (1, 24, 640, 20),
    (2, 12, 1280, 40),
    (4, 6, 2560, 80),
]
BASELINE = "grid_sample"
VARIANTS = {"gathered": 0, "multiplied": 10**6}  # name -> largest map that is multiplied
LARGEST_BOTH = 16**2  # positions; above, the matrix of all weights takes too much memory to be worth a try


def by_grid_sample(value: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    """The published plain-torch idea for 3x3, stride 1: normalise to [-1, 1], grid_sample, weigh, sum."""
    n, height, width, channels = value.shape
    grid = torch.tensor(sampling_points(3, False)) - 1.0
    place = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1)
    pixels = place[None, :, :, None, None] + grid + offset.view(n, height, width, groups, 9, 2)
    normalised = (2 * pixels + 1) / torch.tensor([width, height]) - 1
    maps = (
        value.view(n, height * width, groups, -1).permute(0, 2, 3, 1).reshape(n * groups, -1, height, width)
    )
    grids = normalised.transpose(2, 3).transpose(1, 2).reshape(n * groups, height * width, 9, 2)
    sampled = F.grid_sample(maps, grids, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = (
        mask.view(n, height * width, groups, 9).transpose(1, 2).reshape(n * groups, 1, height * width, 9)
    )
    return (sampled * weights).sum(-1).view(n, channels, height, width).permute(0, 2, 3, 1)


def compiled(leaves: list[Tensor], groups: int, largest: int) -> Tensor:
    """The compiled path, with maps of up to `largest` positions multiplied."""
    with patch.object(dcnv3_gather, "MULTIPLIED_POSITIONS", largest):
        return dcnv3(*leaves, groups=groups, path="compiled")


def measure(shape: tuple[int, int, int, int], rounds: int) -> dict[str, dict[str, float]]:
    """Best milliseconds of forward and backward, by path."""
    batch, side, channels, groups = shape
    generator = torch.Generator().manual_seed(0)
    value, grad = torch.randn(2, batch, side, side, channels, generator=generator)
    offset = torch.randn(batch, side, side, groups * 18, generator=generator)
    mask = torch.rand(batch, side, side, groups, 9, generator=generator).softmax(-1).flatten(-2)
    leaves = [tensor.requires_grad_() for tensor in (value, offset, mask)]
    functions = {path: lambda p=path: dcnv3(*leaves, groups=groups, path=p) for path in PATHS}
    if side**2 <= LARGEST_BOTH:
        del functions["compiled"]  # the two variants of it in its place
        functions |= {
            f"compiled_{name}": lambda m=largest: compiled(leaves, groups, m)
            for name, largest in VARIANTS.items()
        }
    functions[BASELINE] = lambda: by_grid_sample(*leaves, groups)
    expected = functions["reference"]().detach()
    best = {}
    for name, function in functions.items():
        torch.testing.assert_close(function().detach(), expected, rtol=1e-3, atol=1e-4)
        best[name] = {"forward_ms": float("inf"), "backward_ms": float("inf")}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            out = function()
            middle = time.perf_counter()
            torch.autograd.grad(out, leaves, grad)
            end = time.perf_counter()
            best[name]["forward_ms"] = min(best[name]["forward_ms"], (middle - start) * 1e3)
            best[name]["backward_ms"] = min(best[name]["backward_ms"], (end - middle) * 1e3)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="set OMP_NUM_THREADS to the same number")
    parser.add_argument("--rounds", type=int, default=8, help="turns of every path; the best one counts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]  # processes that wanted a core in the minute before; above the cores: busy
    results = []
    for shape in SHAPES:
        times = measure(shape, arguments.rounds)
        totals = {name: sum(parts.values()) for name, parts in times.items()}
        ratios = {name: total / totals["sparse"] for name, total in totals.items() if name != "sparse"}
        faster = ", ".join(f"{ratio:.1f} times as fast as {name}" for name, ratio in ratios.items())
        print(f"{shape}: sparse {totals['sparse']:.1f} ms forward + backward, {faster}")
        results.append(
            {"batch_side_channels_groups": shape, "milliseconds": times, "times_as_fast_as": ratios}
        )
    keep(
        f"dcnv3_cpu_{arguments.threads}t",
        "the sparse path is the fastest plain-torch DCNv3 at every shape (float32, forward + backward)",
        torch.device("cpu"),
        load_average_before=load,
        results=results,
    )


if __name__ == "__main__":
    main()
