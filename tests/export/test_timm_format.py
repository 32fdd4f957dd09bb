"""Does timm load the folder by its own calls, without this package?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from pretrain.export.formats import export
from tests.export.conftest import last


@pytest.fixture(scope="module")
def folder(vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(last(vit_run), "timm", tmp_path_factory.mktemp("timm") / "vit").folder


def test_features_are_the_towers_tokens_at_every_size(vit_run: Path, folder: Path) -> None:
    model, towers = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), last(vit_run).towers
    for size in (64, 96, 128):
        images = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            theirs = model.forward_features(images)[:, 1:]
            torch.testing.assert_close(theirs, towers.encoder(images), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(images), theirs.mean(dim=1), rtol=1e-5, atol=1e-5)


def test_preprocessing_is_that_of_evaluation(folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert list(data["input_size"]) == [3, 64, 64]
    assert (data["crop_pct"], data["interpolation"]) == (1.0, "bicubic")
    assert [*data["mean"], *data["std"]] == [0.485, 0.456, 0.406, 0.229, 0.224, 0.225]


def test_new_classifier_keeps_the_backbone(folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    state = model.state_dict()
    assert all(
        torch.equal(state[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items()
    )
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_larger_model_resizes_the_position_embedding(folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=128, dynamic_img_size=False)
    assert model.pos_embed.shape == (1, 1 + 64, 48)


def test_nothing_but_the_backbone_is_in_the_file(folder: Path) -> None:
    names = {name.split(".")[0] for name in load_file(folder / "model.safetensors")}
    assert names == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}


def test_timm_loads_the_folder_without_this_package(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, timm, torch; "
        f"m = timm.create_model('local-dir:{folder}', pretrained=True); "
        "assert not any(name.split('.')[0] == 'pretrain' for name in sys.modules); "
        "print(tuple(m(torch.zeros(1, 3, 64, 64)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 48)"
