"""How fast does InternImage-H train on a GPU, how much memory does it take, and where does the time go?

    python benchmarks/internimage_h_gpu.py [--batch 64] [--pixels 192] [--only fused]

One forward and backward pass of the backbone in bfloat16 on random images, without checkpointing: with our fused
kernels, and without them (our compiled path, plain torch around it; not the published model). Milliseconds: median,
least and most of 20 steps, each timed by itself; share of the peak counts the model's own products, three times a
forward pass, over 989 TFLOP/s (dense bfloat16 of an H200); memory is the most that torch held. The share of each
group of kernels is told by their names, over five steps under torch's profiler; a fused kernel of torch.compile that
gathers counts as the operator, its products as matrix products. Writes benchmarks/results/internimage_h_gpu.json,
or internimage_h_gpu_fused.json with the fused kernels alone; without a GPU it measures and writes nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import gpu, keep
from pretrain import provenance
from pretrain.kernels.dcnv3_choice import Choice
from pretrain.models.internimage import INTERNIMAGE, InternImage

PEAK = 989e12  # operations a second
MODEL = "internimage_h"
STEPS, PROFILED_STEPS = 20, 5
GROUPS = {  # the first pattern that a kernel's name holds
    "operator": r"sample_kernel|grad_packed_kernel|grad_value|arrange_kernel|index_put|gather",
    "depth-wise, norm and GELU": r"depthwise|norm_gelu",
    "residual and norms": r"residual_norm|layer_norm|LayerNorm",
    "convolutions": r"conv|implicit|fprop|dgrad|wgrad|cudnn",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|splitK|sm90_|ampere_",
    "other pointwise": r"gelu|elementwise|triton_|softmax|CatArray|copy",
    "reductions": r"reduce|column_sum",
}


def group_of(kernel: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, kernel)), "rest")


def forward_operations(pixels: int) -> int:
    """Operations (2 a multiply-add) of the backbone's products and convolutions for one image, from shapes alone;
    without the sampling, which is less than 1 %.
    """
    no_numbers = patch("torch.nn.init.trunc_normal_", lambda tensor, **options: tensor)
    with FakeTensorMode(), no_numbers, FlopCounterMode(display=False) as counter:
        InternImage(INTERNIMAGE[MODEL]).eval()(torch.randn(1, 3, pixels, pixels))
    return counter.get_total_flops()


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    with (
        patch("pretrain.models.internimage_block.choose_path", lambda call: Choice("compiled", "")),
        patch("pretrain.kernels.dcnv3.choose_path", lambda call: Choice("compiled", "")),
        patch("pretrain.kernels.pointwise.choose_path", lambda x: "torch"),
    ):
        yield


def step(model: InternImage, images: Tensor) -> None:
    """Forward and backward; gradients are set anew, as an optimizer that has used them would leave them."""
    model.zero_grad(set_to_none=True)
    model(images)[-1].square().mean().backward()


def step_seconds(model: InternImage, images: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(model, images)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def shares(model: InternImage, images: Tensor) -> dict[str, float]:
    """Share of each group of kernels in the time that kernels take."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as measured:
        for _ in range(PROFILED_STEPS):
            step(model, images)
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in measured.key_averages():
        times[group_of(event.key)] += event.self_device_time_total
    return {group: round(time / times.total(), 3) for group, time in times.most_common()}


def measure(images: Tensor, operations: float) -> dict[str, object]:
    torch.manual_seed(0)
    model = InternImage(INTERNIMAGE[MODEL]).to(images.device, torch.bfloat16).train()
    step(model, images)  # compiles; gradients are there from here on
    torch.cuda.reset_peak_memory_stats()
    times = sorted(step_seconds(model, images) for _ in range(STEPS))
    taken = median(times)
    per_second = len(images) / taken
    return {
        "milliseconds": {"median": taken * 1e3, "least": times[0] * 1e3, "most": times[-1] * 1e3},
        "images_per_second": per_second,
        "share_of_peak": 3 * operations * per_second / PEAK,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "share_of_kernel_time": shares(model, images),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--pixels", type=int, default=192, help="side of an image")
    parser.add_argument("--only", choices=["fused"], help="leave the plain path out: minutes of compiling")
    arguments = parser.parse_args()
    device = gpu()
    images = torch.randn(
        arguments.batch, 3, arguments.pixels, arguments.pixels, device=device, dtype=torch.bfloat16
    )
    operations, found = forward_operations(arguments.pixels), {}
    contexts = {"fused": nullcontext()}
    if arguments.only is None:
        contexts["plain"] = without_fused_kernels()
    for name, context in contexts.items():
        with context:
            found[name] = measure(images, operations)
        torch.cuda.empty_cache()
        print(f"{name} on {provenance.hardware(device)}: {found[name]}")
    ratios = {}
    if arguments.only is None:
        memory = [found[name]["peak_memory_gib"] for name in ("fused", "plain")]
        ratios["memory_fused_over_plain"] = memory[0] / memory[1]
    keep(
        "_".join(["internimage_h_gpu", *filter(None, [arguments.only])]),
        __doc__.splitlines()[0],
        device,
        goals={"share_of_peak": 0.4, "operator_share": 0.22, "memory_over_published": 0.6},
        batch=arguments.batch,
        pixels=arguments.pixels,
        forward_operations_an_image=operations,
        implementations=found,
        **ratios,
    )


if __name__ == "__main__":
    main()
