"""How much faster does InternImage-T run on a CPU than with the published plain-torch DCNv3?

    OMP_NUM_THREADS=1 python benchmarks/internimage_t_cpu.py

Inference of the whole backbone at 224 px, batch 1, float32, random weights: our operator, and the common formulation
by grid_sample (of benchmarks/dcnv3_cpu.py) put in its place; turn about in one process, best of the rounds. Outputs
must agree to 1e-3 of their largest value. Writes benchmarks/results/internimage_t_cpu.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.dcnv3_cpu import by_grid_sample  # noqa: E402
from benchmarks.record import keep  # noqa: E402
from pretrain.models.internimage import INTERNIMAGE, InternImage  # noqa: E402

OPERATOR = "pretrain.models.internimage_block.dcnv3_blended"
ROUNDS = 7


def published(
    value: Tensor, offset: Tensor, logits: Tensor, scale: Tensor | None, **options: object
) -> Tensor:
    """The same operator by normalised grid_sample; InternImage-T has no centre scale."""
    assert scale is None, "InternImage-T blends nothing"
    mask = logits.softmax(-1)
    return by_grid_sample(value, offset, mask.flatten(-2), groups=mask.shape[-2])


def seconds(model: InternImage, images: Tensor) -> tuple[float, Tensor]:
    start = time.perf_counter()
    out = model(images)[-1]
    return time.perf_counter() - start, out


@torch.inference_mode()
def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    model = InternImage(INTERNIMAGE["internimage_t"]).eval()
    for module in model.modules():  # offsets start at zero: give them places between pixels
        if type(module).__name__ == "GroupLinear":
            module.bias.uniform_(-2, 2)
    images = torch.randn(1, 3, 224, 224)
    times: dict[str, list[float]] = {"ours": [], "grid_sample": []}
    for _ in range(ROUNDS):
        took, ours = seconds(model, images)
        times["ours"].append(took)
        with patch(OPERATOR, published):
            took, theirs = seconds(model, images)
        times["grid_sample"].append(took)
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert difference < 1e-3, f"outputs differ by {difference}"
    best = {name: round(1000 * min(took), 1) for name, took in times.items()}
    ratio = best["grid_sample"] / best["ours"]
    print(f"{ratio:.2f} times as fast: {best} ms")
    keep(
        "internimage_t_cpu",
        "InternImage-T at 224 px runs faster on a CPU with our DCNv3 than with that by grid_sample",
        torch.device("cpu"),
        milliseconds=best,
        times_as_fast=round(ratio, 2),
        largest_difference=difference,
    )


if __name__ == "__main__":
    main()
