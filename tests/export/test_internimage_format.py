"""Are the InternImage files what InternImage's code reads?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.config import Pool, Run
from pretrain.export.formats import export
from pretrain.export.trained import Trained
from pretrain.facts import DataFacts
from pretrain.models import internimage_layouts as layouts
from pretrain.models.internimage import INTERNIMAGE, InternImageClassifier
from pretrain.recipes import load
from pretrain.towers import Towers
from tests.evaluate.runs import randomised
from tests.export.conftest import FACTS, last
from tests.fakes import shrink
from tests.paths import SHARED, needs_shared


def trained_of(run: Run, facts: DataFacts = FACTS) -> Trained:
    torch.manual_seed(0)
    towers = randomised(Towers(run, facts)).requires_grad_(False).eval()
    return Trained(run, facts, towers, "teacher", "step_000003", {"step": 3, "position": 24}, None, {})


def plain(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "internimage.pth", weights_only=True)["model"]


def pretraining(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "internimage_pretraining.pth", weights_only=True)["model"]


def test_features_are_proven_at_two_sizes_for_every_output(internimage_run: Path, tmp_path: Path) -> None:
    proof = export(last(internimage_run), "internimage", tmp_path / "out").proof
    outputs = [f"stage {i}" for i in (1, 2, 3, 4)] + ["tokens", "embedding", "logits"]
    for name in ("internimage.pth", "internimage_pretraining.pth"):
        for size in (64, 96):
            assert [a.output for a in proof if (a.file, a.size) == (name, size)] == outputs
    assert all(agreement.max_difference < 1e-4 for agreement in proof)


def test_plain_file_loads_strictly_into_the_published_classifier(tmp_path: Path) -> None:
    # At the published widths the classifier is the published one, whole.
    small = shrink(load("m3i.internimage_h"))
    run = replace(small, backbone=replace(small.backbone, token_width=1024), pool=Pool(heads=16, width=768))
    trained = trained_of(run)
    folder = export(trained, "internimage", tmp_path / "out").folder
    model = InternImageClassifier(INTERNIMAGE[run.backbone.size], len(FACTS.categories)).eval()
    model.load_state_dict(plain(folder), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        ours = trained.towers.category(trained.towers.embed_tokens(trained.towers.encoder(images)))
        torch.testing.assert_close(model(images), ours, rtol=1e-4, atol=1e-4)


@needs_shared
def test_names_and_shapes_of_internimage_h_are_the_published_ones() -> None:
    published = json.loads((SHARED / "golden" / "internimage_state_dicts.json").read_text())["internimage_h"]
    from pretrain.export.internimage import in_layout

    run = replace(load("m3i.internimage_h"), text=shrink(load("m3i.internimage_h")).text)
    categories = tuple(str(index) for index in range(published["num_classes"]))
    with torch.device("meta"):
        towers = Towers(run, DataFacts(categories, 100))
    trained = Trained(run, DataFacts(categories, 100), towers, "teacher", "step_000000", {}, None, {})
    tensors, _ = in_layout(trained, "plain", INTERNIMAGE["internimage_h"])
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert found == {name: list(shape) for name, shape in published["state_dict"].items()}


def test_pretraining_file_has_the_released_layout(internimage_run: Path, tmp_path: Path) -> None:
    state = pretraining(export(last(internimage_run), "internimage", tmp_path / "out").folder)
    assert next(iter(state)) == "mask_token"
    prefixes = {name.rsplit(".", 1)[0] if name.startswith("clip.") else name.split(".")[0] for name in state}
    assert prefixes == {
        "mask_token",
        "dcnv3",
        "dcnv3_head_x3",
        "dcnv3_head_x4",
        "clip_projector",
        "clip.classifier_ln",
        "clip.classifier",
    }


def test_both_files_hold_the_same_weights(internimage_run: Path, tmp_path: Path) -> None:
    folder = export(last(internimage_run), "internimage", tmp_path / "out").folder
    written = pretraining(folder)
    for name, tensor in plain(folder).items():
        assert torch.equal(written[layouts.to_layout_key(name, "pretraining")], tensor), name


def test_size_with_another_published_head_writes_the_backbone_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like_t = replace(INTERNIMAGE["internimage_tiny"], use_clip_projector=False)
    monkeypatch.setitem(INTERNIMAGE, "internimage_tiny", like_t)
    trained = trained_of(shrink(load("m3i.internimage_h")))
    folder = export(trained, "internimage", tmp_path / "out").folder
    assert {name.split(".")[0] for name in plain(folder)} == {"patch_embed", "levels"}
    assert any(name.startswith("dcnv3_head_x4.") for name in pretraining(folder))
    record = json.loads((folder / "keys.json").read_text())["files"]["internimage.pth"]
    assert "another head" in record["skipped"]["pool.cross_dcn.q_bias"]


def test_what_pools_by_the_mean_is_left_out_and_said(tmp_path: Path) -> None:
    small = shrink(load("m3i.internimage_h"))
    run = replace(small, pool=replace(small.pool, kind="mean", norm="batch"))
    exported = export(trained_of(run), "internimage", tmp_path / "out")
    assert {name.split(".")[0] for name in plain(exported.folder)} & {
        "clip_projector",
        "fc_norm",
        "head",
    } == set()
    assert {"stage 4", "tokens"} <= {agreement.output for agreement in exported.proof}
    record = json.loads((exported.folder / "keys.json").read_text())["files"]["internimage.pth"]
    assert "pooled by attention" in record["skipped"]["category.weight"]
    assert "pool by attention" in (exported.folder / "README.md").read_text()


def test_demo_backbone_without_labels_is_exported(demo_run: Path, tmp_path: Path) -> None:
    folder = export(last(demo_run), "internimage", tmp_path / "out").folder
    assert not any(name.startswith("head.") for name in plain(folder))
    card = (folder / "README.md").read_text()
    assert "There is no `head.*`" in card and "has 3 stages" in card


def test_constructor_arguments_stand_beside_the_weights(internimage_run: Path, tmp_path: Path) -> None:
    folder = export(last(internimage_run), "internimage", tmp_path / "out").folder
    fields = json.loads((folder / "config.json").read_text())
    assert layouts.config_from_published(fields) == INTERNIMAGE["internimage_tiny"]


@pytest.mark.parametrize("name", ["internimage.pth", "internimage_pretraining.pth"])
def test_files_hold_tensors_only(internimage_run: Path, tmp_path: Path, name: str) -> None:
    folder = export(last(internimage_run), "internimage", tmp_path / "out").folder
    content = torch.load(folder / name, weights_only=True)
    assert list(content) == ["model"]
    assert all(
        type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in content["model"].values()
    )
