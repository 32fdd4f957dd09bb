"""Does a run start from every published layout with the very weights, and say what fits nowhere?"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from pretrain.checkpoint import WEIGHTS
from pretrain.config import Run
from pretrain.export.formats import EXPORTERS
from pretrain.initial.asked import init_of
from pretrain.initial.layouts import INTERNIMAGE_PARTS, LAYOUTS
from pretrain.initial.start import start_for
from pretrain.models import internimage_layouts
from pretrain.towers import Towers
from tests.export.conftest import last
from tests.initial.conftest import (
    FACTS,
    INTERNIMAGE,
    SWIN,
    VIT,
    encoder_state,
    same,
    started,
    timm_state,
    towers_of,
)

RUNS = {"vit": "vit_run", "swin": "swin_run", "internimage": "internimage_run"}


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def vit_of_hugging_face(size: int = 64) -> ViTModel:
    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=size,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    return ViTModel(config, add_pooling_layer=True).eval()


@pytest.mark.parametrize("family", sorted(RUNS))
def test_every_export_loads_back_bit_identically(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    trained = last(request.getfixturevalue(RUNS[family]))
    ours = trained.towers.state_dict()
    fitting = [name for name, exporter in EXPORTERS.items() if family in exporter.families]
    assert fitting
    for name in sorted(set(fitting) - {"onnx"}):  # a graph, not a file of weights
        (folder := tmp_path / name).mkdir()
        for told, keys in EXPORTERS[name].write(trained, folder).items():
            start, towers = started(folder / told, trained.run, heads=True)
            assert start.fit.left.keys() == keys.added.keys() & {"mask_token"}, told
            assert start.fit.taken + len(start.fit.left) == len(keys.written) + len(keys.added), told
            state = towers.state_dict()
            assert all(torch.equal(state[key], ours[key]) for key in start.fit.sources), told


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_run_starts_from_another_run_and_its_heads(which: str, vit_run: Path) -> None:
    start, towers = started(f"{vit_run}:{which}", VIT, heads=True)
    step = sorted((vit_run / "checkpoints").iterdir())[-1]
    assert same(towers.state_dict(), WEIGHTS[which](step)) and start.which == which
    assert not start.fit.left and not start.fit.kept


def test_a_run_that_does_not_fit_is_not_read(vit_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHTS, "teacher", lambda folder: pytest.fail(f"{folder} was read"))
    with pytest.raises(ValueError, match=r"does not fit: \d+ tensors are missing, such as encoder\.dcnv3"):
        started(vit_run, INTERNIMAGE)


@pytest.mark.parametrize("layout", ["plain", "pretraining", "huggingface"])
def test_internimage_layouts_give_back_every_weight(layout: str, internimage: Towers, tmp_path: Path) -> None:
    plain: dict[str, Tensor] = {}
    for name, tensor in internimage.state_dict().items():
        for prefix, part in INTERNIMAGE_PARTS.items():
            if name.startswith(prefix):
                plain |= internimage_layouts.join({part: {name.removeprefix(prefix): tensor}})
    mask_token = torch.zeros(1, 1, 64) if layout == "pretraining" else None
    state = internimage_layouts.write(plain, layout, mask_token)
    torch.save({"model": state}, tmp_path / "weights.pth")
    start, towers = started(tmp_path / "weights.pth", INTERNIMAGE, heads=True)
    assert same(encoder_state(towers), encoder_state(internimage))
    assert torch.equal(towers.category.weight, internimage.category.weight)
    assert same(towers.pool.state_dict(), internimage.pool.state_dict())
    assert set(start.fit.left) == ({"mask_token"} if layout == "pretraining" else set())
    _, towers = started(tmp_path / "weights.pth", INTERNIMAGE)
    assert not torch.equal(towers.category.weight, internimage.category.weight)


def test_momentum_teacher_of_the_pretraining_layout_is_taken_on_request(
    internimage: Towers, tmp_path: Path
) -> None:
    student, teacher = (encoder_state(towers_of(INTERNIMAGE, seed)) for seed in (5, 6))
    heads = {n.removeprefix("heads."): t for n, t in student.items() if n.startswith("heads.")}
    state = {"mask_token": torch.zeros(1)} | heads | {n: t for n, t in student.items() if "dcnv3." in n[:6]}
    state |= {f"mm_{n}": t for n, t in teacher.items() if n.startswith("dcnv3.")}
    torch.save(state | {"decoder.layer.weight": torch.zeros(2)}, tmp_path / "m3i.pth")
    for which, expected in (("student", student), ("teacher", teacher)):
        start, towers = started(f"{tmp_path}/m3i.pth:{which}", INTERNIMAGE)
        assert same(
            towers.encoder.dcnv3.state_dict(), {n[6:]: t for n, t in expected.items() if n[:6] == "dcnv3."}
        )
        assert start.which == which and "decoder.layer.weight" in start.fit.left


def test_backbone_without_token_heads_keeps_ours_and_says_so(internimage: Towers, tmp_path: Path) -> None:
    state = {
        n.removeprefix("encoder.dcnv3."): t for n, t in internimage.state_dict().items() if ".dcnv3." in n
    }
    torch.save({"state_dict": {f"backbone.{n}": t for n, t in state.items()}}, tmp_path / "detector.pth")
    start, towers = started(tmp_path / "detector.pth", INTERNIMAGE)
    assert same(towers.encoder.dcnv3.state_dict(), internimage.encoder.dcnv3.state_dict())
    assert any("kept as initialised: encoder.heads." in line for line in start.told())


def test_hugging_face_vit_gives_its_features_under_both_names(tmp_path: Path) -> None:
    model = vit_of_hugging_face()
    model.save_pretrained(tmp_path / "classic")
    saved(tmp_path / "five.safetensors", model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for path in (tmp_path / "classic", tmp_path / "five.safetensors"):
        start, towers = started(path, VIT)
        with torch.inference_mode():
            ours, theirs = towers.eval().encoder(images, summary=True), model(images).last_hidden_state
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert all(name.startswith("pooler.") for name in start.fit.left)


def test_classifier_of_hugging_face_is_left_out_by_rule(tmp_path: Path) -> None:
    model = ViTForImageClassification(vit_of_hugging_face().config)
    model.save_pretrained(tmp_path)
    start, _ = started(tmp_path, VIT)
    assert set(start.fit.left) == {"classifier.weight", "classifier.bias"}


def test_layer_scale_is_folded_into_what_it_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=4, num_classes=3, init_values=0.5
    ).eval()
    torch.save(
        {"state_dict_ema": model.state_dict(), "state_dict": model.state_dict()}, tmp_path / "timm.pth"
    )
    start, towers = started(tmp_path / "timm.pth", VIT)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        ours = towers.eval().encoder(images, summary=True)
        torch.testing.assert_close(ours, model.forward_features(images), rtol=1e-4, atol=1e-5)
    assert set(start.fit.left) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("change", ["gone", "other length"])
def test_factors_that_scale_nothing_are_refused(change: str, vit: Towers, tmp_path: Path) -> None:
    state = timm_state(vit, "vit")
    state["blocks.1.ls2.gamma"] = torch.ones(48 if change == "gone" else 47)
    if change == "gone":
        del state["blocks.1.mlp.fc2.weight"], state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(
        ValueError, match=r"--init .*: blocks\.1\.ls2\.gamma has \(4[78],\) factors for the rows of blocks"
    ):
        started(saved(tmp_path / "vit.safetensors", state), VIT)


# timm/layers/interpolate.py, lines 47 and 65
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(("family", "run"), [("vit", VIT), ("swin", SWIN)])
def test_positions_are_resized_as_timm_does(family: str, run: Run, tmp_path: Path) -> None:
    larger = replace(run, views=replace(VIT.views, size=128), mask=replace(VIT.mask, patch=32))
    source = towers_of(larger)
    start, towers = started(saved(tmp_path / "l.safetensors", timm_state(source, family)), run)
    module = towers.encoder.get_submodule(family)
    filter_fn = timm.models.vision_transformer if family == "vit" else timm.models.swin_transformer
    filtered = filter_fn.checkpoint_filter_fn(timm_state(source, family), module)
    assert start.fit.resized and same(module.state_dict(), filtered)
    assert any("resized" in line for line in start.told())


def test_swin_of_older_names_is_read(swin: Towers, tmp_path: Path) -> None:
    state = {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", n): t
        for n, t in timm_state(swin, "swin").items()
    }
    state |= {
        "head.weight": torch.zeros(3, 64),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4),
    }
    _, towers = started(saved(tmp_path / "old.safetensors", state), SWIN)
    assert same(encoder_state(towers), encoder_state(swin))


def spoilt(vit: Towers, change: str) -> dict[str, Tensor]:
    state = timm_state(vit, "vit")
    if change == "missing":
        del state["blocks.1.mlp.fc2.bias"]
    elif change == "unexpected":
        state["reg_token"] = torch.zeros(1, 4, 48)
    elif change == "shape":
        state["patch_embed.proj.weight"] = torch.zeros(48, 3, 14, 14)
    elif change == "nan":
        state["norm.weight"] = torch.full((48,), torch.nan)
    elif change == "unknown":
        state = {"a.b": torch.zeros(1)}
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 tensors are missing, such as blocks\.1\.mlp\.fc2\.bias .*--backbone\.size"),
        ("unexpected", r"1 are unexpected, such as reg_token.*Every tensor must find its place"),
        ("shape", r"patch_embed\.proj\.weight of \(48, 3, 14, 14\) instead of \(48, 3, 16, 16\).*patch"),
        ("nan", r"--init .*norm\.weight holds other than finite numbers .*take other weights"),
        ("unknown", r"names of no layout that is known, such as \['a\.b'\]: give one of"),
    ],
)
def test_what_fits_nowhere_is_named(change: str, message: str, vit: Towers, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        started(saved(tmp_path / "vit.safetensors", spoilt(vit, change)), VIT)


def test_another_architecture_is_refused(vit: Towers, tmp_path: Path) -> None:
    path = saved(tmp_path / "vit.safetensors", timm_state(vit, "vit"))
    with pytest.raises(
        ValueError, match=r"family 'vit' \(timm ViT\), this run trains 'swin': take other weights"
    ):
        started(path, SWIN)


def test_other_number_of_heads_is_refused_although_shapes_agree(tmp_path: Path) -> None:
    vit_of_hugging_face().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    with pytest.raises(
        ValueError, match=r"another model \(num_attention_heads is 8, here 4\): choose the backbone"
    ):
        started(tmp_path, VIT)


def test_head_of_other_classes_is_refused_and_left_out_without_heads(vit_run: Path) -> None:
    init = init_of(str(vit_run), heads=True)
    assert init is not None
    other = dataclasses.replace(FACTS, categories=("one", "two"))
    with pytest.raises(ValueError, match=r"a head of 5 classes, .* has 2 categories: leave out --init-heads"):
        start_for(init, VIT, Towers(VIT, other))
    assert start_for(dataclasses.replace(init, heads=False), VIT, Towers(VIT, other)).fit.sources


def test_questions_without_an_answer_are_refused(vit: Towers, tmp_path: Path) -> None:
    path = saved(tmp_path / "vit.safetensors", timm_state(vit, "vit"))
    with pytest.raises(ValueError, match=r"one set of weights, no teacher .* leave out ':teacher'"):
        started(f"{path}:teacher", VIT)
    with pytest.raises(FileNotFoundError, match=r"does not exist: name a file of weights"):
        init_of(str(tmp_path / "nowhere"), heads=False)
    with pytest.raises(ValueError, match=r"--init-heads would be ignored"):
        init_of(None, heads=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no weights: .* one of model\.safetensors.* \.pth, .*backbone\.pth"
    ):
        started(tmp_path / "empty", VIT)
    (tmp_path / "empty" / "model.onnx").touch()
    with pytest.raises(
        FileNotFoundError, match=r"an export to onnx, whose graph is not read .*another format"
    ):
        started(tmp_path / "empty", VIT)


def test_pixels_that_the_model_saw_otherwise_are_told(vit: Towers, tmp_path: Path) -> None:
    saved(tmp_path / "model.safetensors", timm_state(vit, "vit"))
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 4},
              "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    start, _ = started(tmp_path, VIT)
    assert "its pixels have mean [0.5, 0.5, 0.5]" in start.told()[-1]
    assert start.record()["sha256"] and start.record()["layout"] in LAYOUTS


def test_what_our_own_weights_tell_of_their_run_is_compared(vit_run: Path, tmp_path: Path) -> None:
    trained, (mean, std) = last(vit_run), ((0.5, 0.4, 0.3), (0.25, 0.5, 0.2))
    other = replace(VIT, views=replace(VIT.views, mean=mean, std=std))
    with torch.device("meta"):
        towers = Towers(VIT, FACTS)

    def notes(place: Path, run: Run = other) -> tuple[str, ...]:
        return start_for(init_of(str(place), heads=False), run, towers).notes

    places, told = [vit_run], (f"have mean {list(VIT.views.mean)}", f"have std {list(VIT.views.std)}")
    for name in ("torchvision", "detectron2", "openmmlab", "safetensors"):
        (folder := tmp_path / name).mkdir()
        places += [folder / file for file in EXPORTERS[name].write(trained, folder)]
        (folder / "keys.json").write_text("{}")
    for place in places:
        assert all(one in note for one, note in zip(told, notes(place), strict=True)), place
        assert notes(place, VIT) == (), place
    config = json.loads((tmp_path / "detectron2" / "config.json").read_text())
    config["arguments"]["heads"] = 8
    (tmp_path / "detectron2" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another model \(heads is 8, here 4\): choose the backbone"):
        notes(tmp_path / "detectron2")
    config = json.loads((tmp_path / "safetensors" / "config.json").read_text())
    config["run"]["backbone"]["size"] = "vit_l16"
    (tmp_path / "safetensors" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another model \(.*heads is 16, here 4\)"):
        notes(tmp_path / "safetensors")


@pytest.mark.parametrize(
    ("told", "noted"),
    [
        ({"image_mean": [0.5] * 3, "image_std": list(VIT.views.std)}, [("mean", [0.5] * 3)]),
        ({"image_processor": {"image_std": [0.25] * 3}}, [("std", [0.25] * 3)]),
        ({"do_normalize": False, "image_mean": [0.5] * 3}, [("mean", [0.0] * 3), ("std", [1.0] * 3)]),
        ({"image_mean": list(VIT.views.mean), "image_std": list(VIT.views.std)}, []),
        ({"image_processor": 3}, []),
    ],
)
def test_pixels_of_transformers_are_compared(
    told: dict, noted: list[tuple[str, list[float]]], vit: Towers, tmp_path: Path
) -> None:
    saved(tmp_path / "model.safetensors", timm_state(vit, "vit"))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    notes = started(tmp_path, VIT)[0].notes
    assert len(notes) == len(noted)
    for note, (name, values) in zip(notes, noted, strict=True):
        assert note.startswith(f"its pixels have {name} {values}, this run's")


@pytest.mark.filterwarnings("ignore:.*is skipped, since")
def test_an_unfinished_checkpoint_is_no_start(vit_run: Path, tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step_000003"
    shutil.copytree(vit_run / "checkpoints" / "step_000003", step)
    (step / "COMPLETE").unlink()
    with pytest.raises(ValueError, match=r"cannot be used, since COMPLETE is missing: take another one"):
        started(step, VIT)
    with pytest.raises(
        FileNotFoundError, match=r"holds no whole checkpoint .*wait for its first one, or name"
    ):
        started(tmp_path, VIT)
