"""Do transformers' own classes run an exported InternImage, by files that need nothing of this project?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pretrain.export import huggingface_internimage, huggingface_vit
from pretrain.export.formats import Exported, export
from pretrain.export.huggingface_internimage import FILES, config
from pretrain.export.remote_code.configuration_internimage import InternImageConfig
from pretrain.export.remote_code.internimage_network import InternImageNetwork, initialise
from pretrain.export.remote_code.modeling_internimage import InternImageForImageClassification
from pretrain.models import internimage_layouts as layouts
from pretrain.models.internimage import INTERNIMAGE, InternImage
from tests.export.cards import blocks_of
from tests.export.conftest import FACTS, last
from tests.models.test_internimage import GOLDEN, PUBLISHED, weight_by_rule
from tests.paths import needs_shared

STAGES = [f"stage{index}" for index in (1, 2, 3, 4)]
PROVEN = """
import importlib.util, runpy, sys
assert importlib.util.find_spec("pretrain") is None
runpy.run_path("PROBE", run_name="__main__")
FOLDER = sys.argv[1]
import json, numpy as np, torch
from PIL import Image
torch.set_grad_enabled(True)
image = Image.fromarray(np.arange(90 * 70 * 3, dtype=np.uint8).reshape(90, 70, 3))
"""
THEN = """
from unittest.mock import patch
from huggingface_hub import HfApi
from transformers import AutoModelForImageClassification
assert torch.equal(segmenter.backbone.model.levels[0].norm[0].weight, model.model.levels[0].norm[0].weight)
segmenter.train()
output = segmenter(inputs["pixel_values"].repeat(2, 1, 1, 1), labels=torch.randint(0, 150, (2, 64, 64)))
output.loss.backward()
without = [name for name, p in segmenter.backbone.named_parameters() if p.grad is None or not p.grad.any()]
with patch.object(HfApi, "repo_exists", lambda *_, **__: True):  # as for a name on a hub
    from_hub = AutoBackbone.from_pretrained(FOLDER, trust_remote_code=True, out_indices=[1, 3])
classifier = AutoModelForImageClassification.from_pretrained(FOLDER, trust_remote_code=True)
torch.save({"vit_tokens": vit_tokens, "vit_pixels": vit_pixels,
    "pixels": inputs["pixel_values"], "tokens": tokens, "embedding": embedding,
    "maps": from_hub.eval()(inputs["pixel_values"]).feature_maps}, "PLACE/tensors.pt")
told = {"logits": list(output.logits.shape), "loss": output.loss.item(), "without": without,
    "features": from_hub.out_features, "channels": from_hub.channels, "labels": classifier.config.id2label}
with open("PLACE/told.json", "w") as file:
    json.dump(told, file)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="module")
def exported(internimage_run: Path, vit_run: Path, place: Path) -> Exported:
    """An export whose proof, code of both cards and UperNet on InternImage share a process of their own."""
    trained, vit, folder = last(internimage_run), last(vit_run), place / "vit"
    folder.mkdir()
    huggingface_vit.write(vit, folder)
    code = PROVEN.replace("PROBE", str(huggingface_internimage.PROBE))
    code += blocks_of(huggingface_vit.how_to_load(vit)).replace("FOLDER", str(folder))
    code += "\nvit_tokens, vit_pixels = tokens, inputs['pixel_values']\n"
    code += blocks_of(huggingface_internimage.how_to_load(trained)).replace('"FOLDER"', "FOLDER")
    (place / "probe.py").write_text(code + THEN.replace("PLACE", str(place)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(huggingface_internimage, "PROBE", place / "probe.py")
        return export(trained, "huggingface", place / "out")


@pytest.fixture(scope="module")
def by_card(exported: Exported, place: Path, internimage_run: Path) -> dict:
    """What the code of both cards gives, and a UperNet on InternImage."""
    card = (exported.folder / "README.md").read_text()
    assert huggingface_internimage.how_to_load(last(internimage_run)) in card
    told = json.loads((place / "told.json").read_text())
    return told | torch.load(place / "tensors.pt", weights_only=True)


def test_proof_is_of_every_output_of_every_class_at_two_sizes(exported: Exported) -> None:
    outputs = [f"stage {i}" for i in (1, 2, 3, 4)] + [f"backbone {name}" for name in STAGES]
    wanted = {*outputs, "tokens", "embedding", "logits"}
    for size in (64, 96):
        assert {a.output for a in exported.proof if a.size == size} == wanted
    assert all(agreement.max_difference < 1e-4 for agreement in exported.proof)


def test_card_gives_our_features_without_this_package(by_card: dict, internimage_run: Path) -> None:
    towers = last(internimage_run).towers
    with torch.inference_mode():
        tokens = towers.encoder(by_card["pixels"])
        torch.testing.assert_close(by_card["tokens"], tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(by_card["embedding"], towers.embed_tokens(tokens), rtol=1e-4, atol=1e-4)
        maps = towers.encoder.dcnv3(by_card["pixels"])
    for found, ours in zip(by_card["maps"], (maps[1], maps[3]), strict=True):
        torch.testing.assert_close(found, ours.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


def test_card_of_a_vit_gives_our_tokens_without_this_package(by_card: dict, vit_run: Path) -> None:
    with torch.inference_mode():
        ours = last(vit_run).towers.encoder(by_card["vit_pixels"], summary=True)
    torch.testing.assert_close(by_card["vit_tokens"], ours, rtol=1e-4, atol=1e-4)


def test_backbone_gives_the_stages_that_are_asked_for(by_card: dict) -> None:
    assert (by_card["features"], by_card["channels"]) == (["stage2", "stage4"], [32, 128])


def test_upernet_trains_through_the_backbone(by_card: dict) -> None:
    assert by_card["logits"] == [2, 150, 64, 64] and by_card["loss"] > 0
    assert by_card["without"] == []


def test_labels_are_the_categories_of_the_run(by_card: dict) -> None:
    assert list(by_card["labels"].values()) == list(FACTS.categories)


def test_folder_holds_the_code_and_published_names(exported: Exported) -> None:
    assert {*FILES, "config.json", "preprocessor_config.json"} <= {p.name for p in exported.folder.iterdir()}
    names = load_file(exported.folder / "model.safetensors").keys()
    assert all(name.startswith("model.") for name in names)
    assert "pretrain" not in "".join((exported.folder / name).read_text() for name in FILES)


def test_run_without_attention_pooling_has_tokens_alone(internimage_run: Path) -> None:
    trained = last(internimage_run)
    trained = replace(trained, run=replace(trained.run, pool=replace(trained.run.pool, kind="mean")))
    assert (config(trained)["head"], config(trained)["has_classifier"]) == ("tokens", False)


@needs_shared
@pytest.mark.parametrize("name", ["tiny_t", "tiny_s", "tiny_xl", "tiny_h", "tiny_g"])
def test_remote_code_gives_the_published_numbers(name: str) -> None:
    entry = json.loads((GOLDEN / "internimage_tiny.json").read_text())[name]
    model = InternImageForImageClassification(
        InternImageConfig(**entry["config"], num_labels=entry["num_classes"])
    )
    state = model.eval().state_dict()
    plain = {layouts.to_layout_key(key, "huggingface"): key for key in entry["state_dict"]}
    assert {plain[key]: list(tensor.shape) for key, tensor in state.items()} == entry["state_dict"]
    model.load_state_dict({key: weight_by_rule(plain[key], tensor) for key, tensor in state.items()})
    images = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 64, 96)).astype("float32"))
    with torch.no_grad():
        output = model(images, output_hidden_states=True)
    found = {f"stage{i}": m.permute(0, 2, 3, 1) for i, m in enumerate(output.hidden_states)}
    found |= {"logits": output.logits}
    with np.load(GOLDEN / "internimage_tiny.npz") as stored:
        for key, tensor in found.items():
            golden = stored[f"{name}_{key}"]
            assert abs(tensor.numpy() - golden).max() / abs(golden).max() < 1e-5, key


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_remote_code_has_the_published_names_of_every_size(name: str) -> None:
    entry = json.loads((GOLDEN / "internimage_state_dicts.json").read_text())[name]
    fields = layouts.config_to_published(INTERNIMAGE[name])
    with torch.device("meta"):
        model = InternImageForImageClassification(
            InternImageConfig(**fields, num_labels=entry["num_classes"])
        )
    found = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    wanted = entry["state_dict"].items()
    assert found == {layouts.to_layout_key(key, "huggingface"): shape for key, shape in wanted}


def test_network_has_the_gradients_of_ours() -> None:
    torch.manual_seed(0)
    like_s = replace(
        INTERNIMAGE["internimage_s"],
        channels=16,
        depths=(1, 1),
        groups=(2, 4),
        center_feature_scale=True,
        remove_center=True,
        offset_scale=2.0,
    )
    ours = InternImage(like_s)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    fields = layouts.config_to_published(like_s)
    del fields["use_clip_projector"]
    theirs = InternImageNetwork(**fields, with_cp=True)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 40, 24)
    sum(m.square().mean() for m in ours(images)).backward()
    sum(m.square().mean() for m in theirs(images)).backward()
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_drop_path_and_initialisation_are_the_published_ones() -> None:
    torch.manual_seed(0)
    network = InternImageNetwork(16, (1, 1), (1, 2), drop_path_rate=0.9, layer_scale=0.5)
    network.apply(initialise)
    dcn, images = network.levels[1].blocks[0].dcn, torch.randn(2, 3, 32, 32)
    assert not dcn.offset.weight.any() and not dcn.mask.bias.any() and dcn.input_proj.weight.any()
    assert (network.levels[0].blocks[0].gamma1 == 0.5).all()
    assert not torch.equal(network(images)[1], network(images)[1])
    assert torch.equal(network.eval()(images)[1], network(images)[1])


def test_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head='mlp' is unknown; choose from clip_projector"):
        InternImageForImageClassification(
            InternImageConfig(channels=8, depths=(1, 1), groups=(1, 2), head="mlp")
        )
