"""Does timm load the folder by its own calls, without this package?"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from pretrain.export.formats import export
from pretrain.objectives import OBJECTIVES
from tests.export.conftest import last


@pytest.fixture(scope="module", params=["vit", "swin"])
def run_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_run")


@pytest.fixture(scope="module")
def folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(last(run_folder), "timm", tmp_path_factory.mktemp("timm") / "out").folder


def test_features_are_the_towers_tokens_at_every_size(run_folder: Path, folder: Path) -> None:
    model, encoder = (
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        last(run_folder).towers.encoder,
    )
    for size in (64, 96, 128):
        images = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            theirs, ours = model.forward_features(images).reshape(2, -1, encoder.width), encoder(images)
            torch.testing.assert_close(theirs[:, -ours.shape[1] :], ours, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(images), ours.mean(dim=1), rtol=1e-5, atol=1e-5)


def test_proof_is_at_two_sizes(run_folder: Path, tmp_path: Path) -> None:
    trained = last(run_folder)
    proof = export(trained, "timm", tmp_path / "out").proof
    assert {agreement.size for agreement in proof} == {64, 64 + 2 * trained.towers.encoder.stride}
    assert {"tokens", "pooled features"} <= {agreement.output for agreement in proof}
    assert all(agreement.max_difference < 1e-4 for agreement in proof)


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


def test_larger_vit_resizes_the_position_embedding(vit_run: Path, tmp_path: Path) -> None:
    folder = export(last(vit_run), "timm", tmp_path / "out").folder
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=128, dynamic_img_size=False)
    assert model.pos_embed.shape == (1, 1 + 64, 48)


# Of timm's interpolation: https://github.com/huggingface/pytorch-image-models/blob/main/timm/layers/interpolate.py
@pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing")
def test_larger_swin_resizes_the_tables_of_its_smallest_windows(swin_run: Path, tmp_path: Path) -> None:
    folder = export(last(swin_run), "timm", tmp_path / "out").folder
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=128)
    state = load_file(folder / "model.safetensors")
    name = "layers.{}.blocks.0.attn.relative_position_bias_table"
    # Windows have 4 x 4 tokens; at 64 px the last stage has only 2 x 2.
    assert state[name.format(3)].shape == (3 * 3, 8) and model.state_dict()[name.format(3)].shape == (
        7 * 7,
        8,
    )
    assert torch.equal(model.state_dict()[name.format(0)], state[name.format(0)])


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("vit", {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}),
        ("swin", {"patch_embed", "layers", "norm"}),
    ],
)
def test_nothing_but_the_backbone_is_in_the_file(
    family: str, parts: set[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    trained = last(request.getfixturevalue(f"{family}_run"))
    exported = export(trained, "timm", tmp_path / "out")
    told = exported.keys["model.safetensors"]
    assert {name.split(".")[0] for name in load_file(exported.folder / "model.safetensors")} == parts
    assert told.written.keys() | told.skipped.keys() == trained.towers.state_dict().keys()
    assert not any(name.startswith("encoder.") for name in told.skipped)


@pytest.mark.parametrize("is_trained", [False, True])
def test_card_tells_whether_the_class_token_was_trained(
    vit_run: Path, tmp_path: Path, is_trained: bool
) -> None:
    trained = last(vit_run)
    objective = OBJECTIVES["mvp" if is_trained else "m3i"]
    trained = replace(trained, run=replace(trained.run, objective=objective))
    card = (export(trained, "timm", tmp_path / "out").folder / "README.md").read_text()
    assert ("class token is trained" in card) == is_trained
    assert ("class token was never given a target" in card) != is_trained


def test_card_of_a_swin_says_what_other_sizes_do(swin_run: Path, tmp_path: Path) -> None:
    card = (export(last(swin_run), "timm", tmp_path / "out").folder / "README.md").read_text()
    assert "There is no class token" in card and "windows chosen for 64 pixels" in card


def test_timm_loads_the_folders_without_this_package(vit_run: Path, swin_run: Path, tmp_path: Path) -> None:
    folders = [str(export(last(run), "timm", tmp_path / run.name).folder) for run in (vit_run, swin_run)]
    code = (
        "import sys, timm, torch; "
        "models = [timm.create_model(f'local-dir:{folder}', pretrained=True) for folder in sys.argv[1:]]; "
        "assert not any(name.split('.')[0] == 'pretrain' for name in sys.modules); "
        "print([tuple(model(torch.zeros(1, 3, 64, 64)).shape) for model in models])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *folders], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(1, 48), (1, 64)]"
