"""Does the packed projection train under ZeRO-3 as it does without? Prints JSON; run by test_packed_zero3.py."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import deepspeed
import torch
from torch import Tensor, nn

from pretrain.distributed import start_distributed
from pretrain.engine import mark_gather_units
from pretrain.kernels.dcnv3 import dcnv3_packed
from pretrain.kernels.dcnv3_choice import Choice
from pretrain.models import internimage_block
from pretrain.models.internimage import InternImage, InternImageConfig

STEPS = 3
RATE = 0.1
ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    # Nothing persists and nothing is kept for reuse: a weight used outside its owner's forward would be empty.
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}


class Loss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return sum(stage_map.square().mean() for stage_map in self.model(images))


def sampled_by_reference(value: Tensor, packed: Tensor, **options) -> Tensor:
    """The packed operator on a machine without Triton."""
    return dcnv3_packed(value, packed, **options | {"path": "reference"})


def main(has_scale: bool) -> dict[str, object]:
    torch.manual_seed(0)
    config = InternImageConfig(channels=16, depths=(1, 2), groups=(1, 2), center_feature_scale=has_scale)
    model = InternImage(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    plain = Loss(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    mark_gather_units(model)
    engine, *_ = deepspeed.initialize(model=Loss(model), optimizer=optimizer, config=ZERO3)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    internimage_block.dcnv3_packed = sampled_by_reference
    resident: list[str] = []

    def note_resident(gradient: Tensor) -> None:
        """Called when the backward pass has left the last block behind: all of them should be released."""
        available = [name for name, p in model.levels.named_parameters() if p.ds_status.name == "AVAILABLE"]
        resident.extend(name for name in available if ".blocks." in name)

    model.patch_embed.register_forward_hook(
        lambda module, inputs, out: out.register_hook(note_resident) and None
    )
    for step in range(STEPS):
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        internimage_block.choose_path = lambda call: Choice("triton", "a test")
        engine.backward(engine(images))
        engine.step()
        internimage_block.choose_path = lambda call: Choice("reference", "a test")
        plain_optimizer.zero_grad()
        plain(images).backward()
        plain_optimizer.step()
    error = 0.0
    for parameter, twin in zip(model.parameters(), plain.model.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            error = max(error, float((parameter - twin).abs().max() / twin.abs().max()))
    return {"error": error, "resident": resident}


if __name__ == "__main__":
    start_distributed()
    print(json.dumps({name: main(has_scale=name == "scale") for name in ("scale", "no_scale")}))
