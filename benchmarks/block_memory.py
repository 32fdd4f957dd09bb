"""How much of a block of InternImage-H waits in memory for the backward pass, fused or not, checkpointed or not?

    OMP_NUM_THREADS=1 python benchmarks/block_memory.py

One block a stage at 192 px; kept are numbers per value of the block's map (positions x channels), without its input
and output. `by_kernels`, batch 64: all tensors that autograd holds on to, every memory counted once, from shapes
alone: for the published formulation (modules of torch and its operator's own inputs), for our plain path and for the
fused kernels of a GPU. `by_checkpoint`, batch 1 on the CPU: what a forward pass allocates and does not free. Time:
forward + backward in float32 on the CPU against keeping all; turn about, best of the rounds. Writes
benchmarks/results/block_memory.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from deepspeed.runtime.zero.linear import zero3_linear_wrap  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.record import keep  # noqa: E402
from pretrain.kernels.dcnv3_choice import Choice  # noqa: E402
from pretrain.models.activations import CHECKPOINTS  # noqa: E402
from pretrain.models.internimage_block import Block  # noqa: E402
from pretrain.models.internimage_config import INTERNIMAGE  # noqa: E402
from pretrain.models.pooling import init_linear_and_norm  # noqa: E402

PIXELS = 192
BATCH = 64
ROUNDS = 3


def kept_values(run: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor) -> float:
    """Numbers kept a value of the map; input, output and parameters not counted."""
    found: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
        held.append(tensor)  # so that no storage is freed and its address used again
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        out = run(x)
    for tensor in (x, out, *block.parameters()):
        found.pop(tensor.untyped_storage()._cdata, None)
    return sum(found.values()) / x.nbytes


def allocated_values(choice: str, block: Block, x: Tensor) -> float:
    """Numbers that a forward pass under `choice` leaves allocated, a value of the map."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as measured:
        out = CHECKPOINTS[choice](block, x)
    return (sum(event.self_cpu_memory_usage for event in measured.events()) - out.nbytes) / x.nbytes


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Blocks take the fused kernels, whose shapes are computed and nothing else."""
    with (
        patch("pretrain.models.internimage_block.choose_path", lambda call: Choice("triton", "")),
        patch("pretrain.kernels.dcnv3.triton_obstacle", lambda device: None),
        patch("pretrain.kernels.pointwise.choose_path", lambda x: "triton"),
    ):
        yield


def published_forward(block: Block, x: Tensor) -> Tensor:
    """The block as published, module by module: its operator keeps value, offsets and masks."""
    dcn, width = block.dcn, x.shape[-1]

    def norm(module: nn.Module, y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), module[0].weight, module[0].bias, 1e-6)

    y = norm(block.norm1, x)
    value = F.linear(y, dcn.input_proj.weight, dcn.input_proj.bias)
    depthwise, (_, inner) = dcn.dw_conv
    pre = F.conv2d(y.permute(0, 3, 1, 2), depthwise.weight, depthwise.bias, padding=2, groups=width)
    guide = F.gelu(F.layer_norm(pre.permute(0, 2, 3, 1), (width,), inner.weight, inner.bias, 1e-6))
    offset = F.linear(guide, dcn.offset.weight, dcn.offset.bias)
    logits = F.linear(guide, dcn.mask.weight, dcn.mask.bias)
    mask = F.softmax(logits.unflatten(-1, (dcn.groups, -1)), -1).flatten(-2)
    sampled = _Sampled.apply(value, offset, mask)
    scale = F.linear(
        guide, dcn.center_feature_scale_proj_weight, dcn.center_feature_scale_proj_bias
    ).sigmoid()
    scale = scale[..., None].repeat(1, 1, 1, 1, width // dcn.groups).flatten(-2)
    sampled = sampled * (1 - scale) + value * scale
    branch = F.linear(sampled, dcn.output_proj.weight, dcn.output_proj.bias)
    x = x + norm(block.res_post_norm1, branch)
    hidden = F.gelu(F.linear(norm(block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias))
    return x + norm(block.res_post_norm2, F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias))


class _Sampled(torch.autograd.Function):
    """Keeps what the published operator keeps; computes nothing."""

    @staticmethod
    def forward(ctx, value: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(value, offset, mask)
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ctx.saved_tensors


def seconds(choice: str, block: Block, x: Tensor) -> float:
    """Of one forward and backward pass."""
    start = time.perf_counter()
    CHECKPOINTS[choice](block, x).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    config, rows = INTERNIMAGE["internimage_h"], []
    for stage, (width, stride) in enumerate(zip(config.widths, config.strides, strict=True)):
        side = PIXELS // stride
        with FakeTensorMode():
            block = Block(config, stage, drop_path=0.0)
            x = torch.randn(BATCH, side, side, width, requires_grad=True)
            kept = {"published": kept_values(partial(published_forward, block), block, x)}
            kept["plain"] = kept_values(block, block, x)
            with as_on_a_gpu():
                kept["fused"] = kept_values(block, block, x)
        block = Block(config, stage, drop_path=0.0).train()
        block.apply(init_linear_and_norm)
        x = torch.randn(1, side, side, width, requires_grad=True)
        allocated = {choice: allocated_values(choice, block, x) for choice in CHECKPOINTS}
        with patch("torch.nn.functional.linear", zero3_linear_wrap):  # what DeepSpeed puts there
            allocated["selective, ZeRO-3"] = allocated_values("selective", block, x)
        rounds = [{choice: seconds(choice, block, x) for choice in CHECKPOINTS} for _ in range(ROUNDS)]
        best = {choice: min(one[choice] for one in rounds) for choice in CHECKPOINTS}
        rows.append({
            "stage": stage + 1,
            "values_an_image": config.depths[stage] * side**2 * width,  # in the maps of all its blocks
            "by_kernels": {name: round(value, 2) for name, value in kept.items()},
            "by_checkpoint": {name: round(value, 2) for name, value in allocated.items()},
            "times_as_slow": {choice: round(value / best["none"], 2) for choice, value in best.items()},
        })  # fmt: skip
        print(rows[-1], flush=True)
    sizes = [row["values_an_image"] for row in rows]
    mean = {
        name: sum(size * row["by_kernels"][name] for size, row in zip(sizes, rows, strict=True)) / sum(sizes)
        for name in rows[0]["by_kernels"]
    }
    keep(
        "block_memory",
        "our blocks keep less for the backward pass than published ones; checkpointing keeps less still",
        torch.device("cpu"),
        unit="numbers kept a value of the block's map; time of forward + backward relative to keeping all",
        rows=rows,
        all_blocks_by_kernels={name: round(value, 2) for name, value in mean.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
