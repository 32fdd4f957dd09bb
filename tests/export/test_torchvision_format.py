"""Do torchvision's detectors take the exported folder as their backbone?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import MaskRCNN

from pretrain.export.formats import export
from tests.export.conftest import last


@pytest.mark.parametrize("family", ["vit_run", "internimage_run"])
def test_mask_rcnn_trains_and_detects_on_the_folder(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    exported = export(last(request.getfixturevalue(family)), "torchvision", tmp_path / "out")
    told = json.loads((exported.folder / "config.json").read_text())
    torch.manual_seed(0)
    backbone = torch.hub.load(str(exported.folder), "backbone", 16, source="local")
    statistics = {"image_mean": told["image_mean"], "image_std": told["image_std"]}
    model = MaskRCNN(backbone, 3, min_size=64, max_size=64, **statistics)
    maps = backbone(torch.randn(1, 3, 64, 128))
    assert [tuple(one.shape) for one in maps.values()] == [
        (1, 16, 64 // stride, 128 // stride) for stride in (4, 8, 16, 32, 64)
    ]
    assert backbone.out_channels == 16
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    losses = model([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in backbone.body.network.patch_embed.parameters())
    with torch.inference_mode():
        assert model.eval()([torch.rand(3, 64, 64)])[0].keys() == {"boxes", "labels", "scores", "masks"}


def test_the_maps_are_those_of_pre_training_at_two_sizes(
    vit_run: Path, internimage_run: Path, tmp_path: Path
) -> None:
    proof = export(last(internimage_run), "torchvision", tmp_path / "a").proof
    assert [(a.output, a.size) for a in proof] == [(f"map {i}", s) for s in (64, 96) for i in range(4)]
    assert all(agreement.max_difference < 1e-4 for agreement in proof)
    proof = export(last(vit_run), "torchvision", tmp_path / "b").proof
    assert [(a.output, a.size) for a in proof] == [("map 0", 64), ("map 0", 96)]
