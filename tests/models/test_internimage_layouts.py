"""Do published checkpoint layouts read and write without loss?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.models.internimage import INTERNIMAGE, InternImage, InternImageClassifier, InternImageConfig
from pretrain.models.internimage_layouts import (
    config_from_published,
    config_to_published,
    detect_layout,
    join,
    read,
    split,
    write,
)

TINY = InternImageConfig(channels=16, depths=(1, 1), groups=(1, 2), layer_scale=0.1, use_clip_projector=True)


@pytest.fixture(scope="module")
def model() -> InternImageClassifier:
    with torch.device("meta"):
        shapes = InternImageClassifier(TINY, 3)
    return shapes.to_empty(device="cpu").apply(lambda m: None)


def numbered(model: InternImageClassifier) -> dict[str, Tensor]:
    return {key: torch.full(t.shape, float(i)) for i, (key, t) in enumerate(model.state_dict().items())}


@pytest.mark.parametrize("layout", ["plain", "pretraining", "huggingface"])
def test_write_then_read_gives_every_tensor_back(model, layout):
    state = numbered(model)
    mask_token = torch.zeros(1, 1, 16) if layout == "pretraining" else None
    theirs = write(state, layout, mask_token)
    assert detect_layout(theirs) == layout
    back, report = read(theirs, model)
    report.require_exact()
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    assert report.skipped == (("mask_token",) if layout == "pretraining" else ())
    assert set(report.taken) | set(report.skipped) == set(theirs)
    model.load_state_dict(back)


def test_pretraining_layout_has_the_names_that_its_reader_looks_for(model):
    keys = list(write(model.state_dict(), "pretraining", torch.zeros(1)))
    assert keys[0] == "mask_token"
    assert {"dcnv3.patch_embed.conv1.weight", "dcnv3_head_x3.weight", "clip_projector.cross_dcn.q_bias",
            "clip.classifier_ln.weight", "clip.classifier.bias"} <= set(keys)  # fmt: skip
    assert "dcnv3.levels.0.blocks.0.gamma1" in keys


def test_hugging_face_layout_renames_layer_scale(model):
    assert "model.levels.1.blocks.0.layer_scale2" in write(model.state_dict(), "huggingface")


def test_report_names_what_is_missing_unexpected_and_reshaped(model):
    state = numbered(model)
    del state["head.bias"]
    state["head.weight"] = torch.zeros(5, 768)
    state["extra"] = torch.zeros(1)
    tensors, report = read(state, model)
    assert report.missing == ("head.bias",)
    assert report.unexpected == ("extra",)
    assert report.reshaped == ("head.weight",)
    assert "head.weight" not in tensors and len(report.taken) == len(tensors)
    assert "1 missing" in str(report)
    with pytest.raises(ValueError, match=r"1 missing, first 'head\.bias'"):
        report.require_exact()


def test_momentum_teacher_is_skipped_and_reported(model):
    theirs = write(numbered(model), "pretraining", torch.zeros(1))
    theirs["mm_dcnv3.patch_embed.conv1.weight"] = torch.zeros(1)
    _, report = read(theirs, model)
    assert report.require_exact().skipped == ("mask_token", "mm_dcnv3.patch_embed.conv1.weight")


def test_parts_load_into_the_modules_of_pretraining_and_join_again(model):
    state = numbered(model)
    parts = split(state)
    assert set(parts) == {"backbone", "tokens", "pool", "norm", "head"}
    InternImage(TINY).load_state_dict(parts["backbone"])
    model.clip_projector.load_state_dict(parts["pool"])
    assert join(parts).keys() == state.keys()


@pytest.mark.parametrize("name", INTERNIMAGE)
def test_published_configuration_fields_round_trip(name):
    assert config_from_published(config_to_published(INTERNIMAGE[name])) == INTERNIMAGE[name]


def test_unknown_names_are_refused(model):
    with pytest.raises(ValueError, match="choose from"):
        write({}, "timm")
    with pytest.raises(ValueError, match="no tensor of InternImage"):
        split({"blocks.0.attn.qkv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="choose from"):
        join({"body": {}})
    with pytest.raises(ValueError, match="mask_token=none"):
        write({}, "pretraining")


@pytest.mark.parametrize("wrap", [
    lambda state: {"model": state, "epoch": 3},
    lambda state: {"state_dict": state},
    lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
    lambda state: {"model": {f"_orig_mod.{key}": tensor for key, tensor in state.items()}},
])  # fmt: skip
def test_containers_and_wrappers_are_looked_through(model, wrap):
    state = numbered(model)
    back, report = read(wrap(state), model)
    report.require_exact()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_an_entry_that_is_no_tensor_is_named(model):
    with pytest.raises(ValueError, match=r"'head\.bias' is int, no tensor"):
        read(numbered(model) | {"head.bias": 3}, model)


def test_a_container_that_holds_itself_ends(model):
    state: dict[str, object] = {}
    state["model"] = state
    with pytest.raises(ValueError, match="or one that holds itself"):
        read(state, model)


def test_a_key_that_only_begins_like_a_skipped_one_is_unexpected(model):
    theirs = write(numbered(model), "pretraining", torch.zeros(1)) | {
        "mask_token_proj.weight": torch.zeros(1)
    }
    _, report = read(theirs, model)
    assert report.unexpected == ("mask_token_proj.weight",) and report.skipped == ("mask_token",)


def test_the_message_of_a_misfit_counts_every_kind(model):
    state = numbered(model)
    del state["head.bias"]
    _, report = read(state | {"extra": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match=r"1 missing, first 'head\.bias' \(in all .*1 missing, 1 unexpected"):
        report.require_exact()


def test_published_arguments_that_change_no_number_are_passed_over():
    fields = config_to_published(TINY)
    published = fields | {"core_op": "DCNv3", "norm_layer": "LN", "act_layer": "GELU", "num_classes": 9}
    assert config_from_published(published) == TINY
    with pytest.raises(ValueError, match=r"norm_layer='BN' is not served"):
        config_from_published(fields | {"norm_layer": "BN"})
    with pytest.raises(ValueError, match=r"needs level2_post_norm_block_ids"):
        config_from_published({"channels": 16, "depths": [1], "groups": [1], "level2_post_norm": True})
