"""Is a transformer encoder whose blocks torch.compile fuses faster, forward and backward?

    python benchmarks/compile_blocks.py [--size vit_s16] [--images 8] [--rounds 15]

The same encoder plain and compiled, in turns in one process, float32 on a CPU or bfloat16 on a GPU; median of the
rounds, and what the first call takes. Writes benchmarks/results/compile_blocks_{cpu,gpu}.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.record import keep
from pretrain.compiled import compile_blocks
from pretrain.config import Backbone
from pretrain.models.backbone import build_encoder

PIXELS = 224


def seconds(model: nn.Module, images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    model(images).float().square().mean().backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="vit_s16")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = {}
    for form in ("plain", "compiled"):
        torch.manual_seed(0)
        family = "vit" if arguments.size.startswith("vit") else "swin"
        encoder = build_encoder(Backbone(family=family, size=arguments.size, drop_path=0.0), PIXELS)
        models[form] = encoder.to(device, dtype)
    compile_blocks(models["compiled"])
    images = torch.randn(arguments.images, 3, PIXELS, PIXELS, device=device, dtype=dtype)
    first = {form: seconds(model, images) for form, model in models.items()}
    times: dict[str, list[float]] = {form: [] for form in models}
    for _ in range(arguments.rounds):
        for form, model in models.items():
            times[form].append(seconds(model, images))
    medians = {form: median(values) for form, values in times.items()}
    keep(
        f"compile_blocks_{'gpu' if device.type == 'cuda' else 'cpu'}",
        "an encoder whose blocks are compiled takes this share of the plain one's time",
        device,
        size=arguments.size,
        images=arguments.images,
        rounds=arguments.rounds,
        median_seconds=medians,
        least_seconds={form: min(values) for form, values in times.items()},
        first_call_seconds=first,
        compiled_by_plain=medians["compiled"] / medians["plain"],
    )
    print(
        f"compiled / plain: {medians['compiled'] / medians['plain']:.3f}; first call {first['compiled']:.0f} s"
    )


if __name__ == "__main__":
    main()
