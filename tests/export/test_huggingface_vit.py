"""Is the folder of a ViT what transformers' ViTModel computes our features from?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTModel

from pretrain.data.views import center_view
from pretrain.export.formats import Exported, export
from pretrain.export.huggingface_vit import NORM_EPS, classic_keys, load
from pretrain.models.pixels import normalise
from tests.export.conftest import last


@pytest.fixture(scope="module")
def exported(vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(last(vit_run), "huggingface", tmp_path_factory.mktemp("huggingface") / "out")


def test_proof_is_of_all_tokens_at_two_sizes(exported: Exported) -> None:
    compared = [(agreement.output, agreement.size) for agreement in exported.proof]
    assert compared == [("class token", 64), ("tokens", 64), ("class token", 128), ("tokens", 128)]
    assert all(agreement.max_difference < 1e-4 for agreement in exported.proof)


def test_names_are_the_classic_ones(exported: Exported) -> None:
    layer = "encoder.layer.0."
    names = load_file(exported.folder / "model.safetensors").keys()
    assert {name.removeprefix(layer) for name in names if name.startswith(layer)} == {
        f"{module}.{kind}"
        for module in (
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
            "layernorm_before",
            "layernorm_after",
        )
        for kind in ("weight", "bias")
    }
    assert {name for name in names if not name.startswith("encoder.layer.")} == {
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.bias",
        "layernorm.weight",
        "layernorm.bias",
    }


def test_config_says_the_epsilon_that_we_train_with(exported: Exported) -> None:
    assert json.loads((exported.folder / "config.json").read_text())["layer_norm_eps"] == 1e-6
    assert load(exported.folder).layernorm.eps == 1e-6


def test_layer_scale_is_folded_into_the_projections() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32,
        patch_size=16,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=0,
        global_pool="",
        init_values=0.3,
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tensors, origins = classic_keys(model.state_dict())
    assert not any("ls" in name.split(".") for name in origins.values())
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=32,
        layer_norm_eps=NORM_EPS,
    )
    theirs, told = ViTModel.from_pretrained(
        None, config=config, state_dict=tensors, add_pooling_layer=False, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(images).last_hidden_state, model(images))


def test_processor_makes_the_pixels_of_our_evaluation(exported: Exported, vit_run: Path) -> None:
    image = np.linspace(0, 255, 100 * 130 * 3).reshape(100, 130, 3).astype(np.uint8)
    processor = AutoImageProcessor.from_pretrained(exported.folder)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    views = last(vit_run).run.views
    ours = normalise(center_view(torch.from_numpy(image), 64)[None], views.mean, views.std, torch.float32)[0]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 5 / 255 / 0.22  # ours resizes in 8-bit fixed point: within 5 levels
    assert (theirs - ours).abs().mean() < 0.02


def test_swin_is_refused_with_what_serves_instead(swin_run: Path) -> None:
    with pytest.raises(ValueError, match=r"choose from .*'timm'.*folder of --to timm loads there"):
        export(last(swin_run), "huggingface", swin_run / "out")


def test_what_serves_instead_gives_the_tokens_of_a_swin(swin_run: Path, tmp_path: Path) -> None:
    trained = last(swin_run)
    model = AutoModel.from_pretrained(export(trained, "timm", tmp_path / "out").folder).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        ours = trained.towers.encoder(images)
        torch.testing.assert_close(model(images).last_hidden_state.reshape(ours.shape), ours)
