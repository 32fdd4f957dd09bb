"""Does a guide say of an image what the library that trained it would say, wherever its weights come from?"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretrain.checkpoint import load_towers
from pretrain.models.guides import Guide, open_guide
from pretrain.models.guides.guide import Opened, nearest_codes
from tests.models.guide_folders import (
    MEAN,
    PATCH,
    SHARED,
    SIZE,
    STD,
    WIDTH,
    clip_folder,
    open_clip_folder,
    own_run,
    pixels,
    random_views,
    vit_folder,
)

GRID = SIZE // PATCH
# Kernels differ with the shape of a batch and the form of attention: float32 rounding.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, clip_folder(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("vit")
    return folder, vit_folder(folder)


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("open") / "clip"
    return folder, open_clip_folder(folder)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_run(tmp_path_factory.mktemp("run"))


@torch.no_grad()
def test_clip_tokens_are_its_last_ones_through_norm_and_projection(clip: tuple[Path, Any]) -> None:
    folder, model = clip
    guide, views = open_guide(folder), random_views(3, SIZE)
    assert (guide.width, guide.patch, guide.grid, guide.num_codes) == (SHARED, PATCH, GRID, 0)
    last = model.vision_model(pixel_values=pixels(views)).last_hidden_state
    expected = model.visual_projection(model.vision_model.post_layernorm(last))
    torch.testing.assert_close(guide(views, GRID), expected, **CLOSE)
    embedding = model.get_image_features(pixel_values=pixels(views)).pooler_output
    torch.testing.assert_close(guide(views, GRID)[:, 0], embedding, **CLOSE)


@torch.no_grad()
def test_vit_tokens_are_those_after_its_final_norm(vit: tuple[Path, Any]) -> None:
    folder, model = vit
    guide, views = open_guide(folder), random_views(3, SIZE)
    assert (guide.width, guide.patch, guide.grid) == (WIDTH, PATCH, GRID)
    torch.testing.assert_close(
        guide(views, GRID), model(pixel_values=pixels(views)).last_hidden_state, **CLOSE
    )


@torch.no_grad()
def test_open_clip_summary_is_its_own_embedding_and_tokens_share_its_space(
    open_clip: tuple[Path, Any],
) -> None:
    folder, model = open_clip
    guide, views = open_guide(folder), random_views(3, SIZE)
    assert (guide.width, guide.patch, guide.grid) == (SHARED, PATCH, GRID)
    found = guide(views, GRID)
    torch.testing.assert_close(found[:, 0], model.encode_image(pixels(views)), **CLOSE)
    last = model.visual.forward_intermediates(
        pixels(views), indices=1, normalize_intermediates=True, output_fmt="NLC"
    )["image_intermediates"][-1]
    torch.testing.assert_close(found[:, 1:], last @ model.visual.proj, **CLOSE)


@torch.no_grad()
def test_own_run_gives_the_tokens_of_its_newest_teacher(run_folder: Path) -> None:
    newest = run_folder / "checkpoints" / "step_000003"
    guide, views = open_guide(run_folder), random_views(3, 64)
    run, _, towers = load_towers(newest)
    assert (guide.width, guide.patch, guide.grid) == (48, 16, 4)
    images = pixels(views, run.views.mean, run.views.std)
    torch.testing.assert_close(guide(views, 4), towers.encoder.norm(towers.encoder.vit(images)), **CLOSE)
    assert open_guide(newest).sha256 == guide.sha256
    assert open_guide(run_folder / "checkpoints" / "step_000000").sha256 != guide.sha256


def test_views_are_resized_as_pillow_does_to_the_pixels_of_the_grid(vit: tuple[Path, Any]) -> None:
    guide, views = open_guide(vit[0]), 64 + random_views(2, 48) // 2  # nothing to cut at black and white
    photos = [Image.fromarray(view.permute(1, 2, 0).numpy()) for view in views]
    small = np.stack([np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for photo in photos])
    expected = pixels(torch.from_numpy(small).permute(0, 3, 1, 2))
    # Pillow rounds to whole levels after each of its two passes, which the second can enlarge.
    assert (guide._images(views, SIZE) - expected).abs().max() < 2 / 255 / min(STD)
    torch.testing.assert_close(guide._images(views, 48), pixels(views))


def test_another_mean_gives_other_features_and_another_fingerprint(
    clip: tuple[Path, Any], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(clip[0], tmp_path / "copy"))
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.1, 0.2, 0.3]}))
    first, second, views = open_guide(clip[0]), open_guide(copy), random_views(2, SIZE)
    assert not torch.allclose(first(views, GRID), second(views, GRID), atol=1e-2)
    assert first.sha256 != second.sha256 and first.sha256 == open_guide(clip[0]).sha256


def test_clip_without_processor_is_normalised_as_published_and_others_are_refused(tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip", with_processor=False)
    assert open_guide(tmp_path / "clip").mean == (0.48145466, 0.4578275, 0.40821073)
    vit_folder(tmp_path / "vit", with_processor=False)
    with pytest.raises(ValueError, match=r"does not tell the mean .*: save its image processor there"):
        open_guide(tmp_path / "vit")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "vit", "open_clip"])
def test_another_grid_takes_interpolated_positions(kind: str, request: pytest.FixtureRequest) -> None:
    """Far beyond rounding, a smooth image looks the same to a finer grid: positions are stretched, not cut."""
    folder, _ = request.getfixturevalue(kind)
    guide = open_guide(folder)
    flat = torch.full((1, 3, SIZE, SIZE), 90, dtype=torch.uint8)
    coarse, fine = guide(flat, GRID)[0, 1:], guide(flat, 2 * GRID)[0, 1:]
    assert fine.shape == (4 * GRID**2, guide.width)
    means = fine.view(GRID, 2, GRID, 2, -1).mean(dim=(1, 3)).flatten(0, 1)
    nearest = torch.cdist(F.normalize(means, dim=-1), F.normalize(coarse, dim=-1)).argmin(dim=1)
    assert (nearest == torch.arange(GRID**2)).float().mean() > 0.5  # by chance 1/16


def test_no_gradient_reaches_a_guide_and_it_stays_in_eval_mode(clip: tuple[Path, Any]) -> None:
    guide = open_guide(clip[0])
    around = torch.nn.ModuleList([guide]).train()
    assert not any(module.training for module in guide.modules()) and around.training
    features = guide(random_views(2, SIZE), GRID)
    assert not features.requires_grad and not any(p.requires_grad for p in guide.parameters())
    weight = torch.ones((), requires_grad=True)
    (weight * features).sum().backward()  # features may be saved for the backward pass of what is trained
    assert weight.grad is not None


@pytest.mark.parametrize("kind", ["clip", "vit", "open_clip"])
def test_bfloat16_computes_in_it_and_returns_float32(kind: str, request: pytest.FixtureRequest) -> None:
    guide, views = open_guide(request.getfixturevalue(kind)[0]), random_views(2, SIZE)
    exact = guide(views, GRID + 1)
    rounded = guide.to(torch.bfloat16)(views, GRID + 1)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, rounded.bfloat16().float())
    assert F.cosine_similarity(exact, rounded, dim=-1).min() > 0.99 and not torch.equal(exact, rounded)


def test_codes_are_the_nearest_by_cosine(vit: tuple[Path, Any]) -> None:
    plain, views = open_guide(vit[0]), random_views(3, SIZE)
    codebook = torch.randn(37, WIDTH, generator=torch.Generator().manual_seed(1))
    opened = Opened(plain.tower, WIDTH, PATCH, GRID, MEAN, STD, plain.folder, plain.files)
    guide = Guide(opened, F.normalize(codebook, dim=-1))
    codes = guide.codes(views, GRID)
    tokens = plain(views, GRID)[:, 1:].double()
    similarity = F.cosine_similarity(tokens[:, :, None], codebook.double()[None, None], dim=-1)
    assert guide.num_codes == 37 and codes.shape == (3, GRID**2)
    assert torch.equal(codes, similarity.argmax(dim=-1))
    with pytest.raises(ValueError, match=r"is a guide without codebook: make a tokenizer of it by"):
        plain.codes(views, GRID)


def test_a_codebook_stays_float32_in_a_bfloat16_guide(vit: tuple[Path, Any]) -> None:
    plain = open_guide(vit[0])
    codebook = F.normalize(torch.randn(9, WIDTH), dim=-1)
    opened = Opened(plain.tower, WIDTH, PATCH, GRID, MEAN, STD, plain.folder, plain.files)
    guide = torch.nn.Sequential(Guide(opened, codebook.clone())).to(torch.bfloat16)[0]
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.bfloat16}
    assert torch.equal(guide.codebook, codebook) and guide.codebook is guide.get_buffer("codebook")
    assert guide.to("meta").codebook.is_meta


def test_codes_do_not_depend_on_how_many_tokens_are_looked_up_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, codebook = torch.randn(50, 8), torch.randn(5, 8)
    whole = nearest_codes(tokens, codebook)
    monkeypatch.setattr("pretrain.models.guides.guide.RUN_BYTES", 4 * 5 * 7)  # seven tokens
    parts = nearest_codes(tokens, codebook)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("kind", "safe", "harmful"),
    [
        ("clip", "model.safetensors", "pytorch_model.bin"),
        ("open_clip", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ],
)
def test_pickle_that_would_run_code_is_refused(
    kind: str, safe: str, harmful: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(request.getfixturevalue(kind)[0], tmp_path / "copy"))
    (copy / safe).unlink()
    torch.save({"weight": Harmful(tmp_path / "ran")}, copy / harmful)
    with pytest.raises(ValueError, match="would call 'posix mkdir' when it is read"):
        open_guide(copy)
    assert not (tmp_path / "ran").exists()
    torch.load(copy / harmful, weights_only=False)  # it would have run
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_what_is_not_loaded_is_no_reason_to_refuse_a_guide(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A folder that a trainer left holds the states of its generators, and weights in an older format."""
    copy = Path(shutil.copytree(request.getfixturevalue(kind)[0], tmp_path / "copy"))
    for name in ("rng_state.pth", "training_args.bin", "pytorch_model.bin", "optimizer.pt"):
        torch.save({"weight": Harmful(tmp_path / "ran")}, copy / name)
    assert open_guide(copy).width == SHARED
    assert not (tmp_path / "ran").exists()


def test_files_that_an_index_or_the_settings_name_are_judged(clip: tuple[Path, Any], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(clip[0], tmp_path / "copy"))
    index = copy / "model.safetensors.index.json"
    (copy / "model.safetensors").rename(copy / "part.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"visual_projection.weight": "a.bin"}}))
    torch.save({"weight": Harmful(tmp_path / "ran")}, copy / "a.bin")
    with pytest.raises(ValueError, match="would call 'posix mkdir' when it is read"):
        open_guide(copy)
    index.write_text(index.read_text().replace("a.bin", "../a.bin"))
    with pytest.raises(ValueError, match=r"names '\.\./a\.bin' as its weights, which must be .* right in it"):
        open_guide(copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"transformers_weights": "part.safetensors"}))
    assert "part.safetensors" in open_guide(copy).files


def test_missing_weights_are_refused_instead_of_drawn(clip: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(clip[0], tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of CLIPModel, such as visual_projection.weight"):
        open_guide(copy)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_weights_of_more_blocks_than_the_settings_tell_are_refused(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, _ = request.getfixturevalue(kind)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    settings = json.loads((copy / "config.json").read_text())
    settings.get("vision_config", settings)["num_hidden_layers"] = 1
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"copy holds \d+ tensors of blocks that its settings do not tell of, such"
    ):
        open_guide(copy)


def test_weights_that_are_not_finite_are_refused(clip: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(clip[0], tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"copy has 1 weights that are not finite, such as .*projection"):
        open_guide(copy)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"num_attention_heads": 0}, r"copy cannot be opened \(ZeroDivisionError"),
        ("config.json", {"hidden_size": "abc"}, r"copy cannot be (opened|read)"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, r"mean=\(0\.5,\), .* three finite numbers each"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, r"three finite numbers each, std above 0"),
    ],
)
def test_settings_that_do_not_fit_are_told_in_a_line(
    vit: tuple[Path, Any], tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    copy = Path(shutil.copytree(vit[0], tmp_path / "copy"))
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        open_guide(copy)


def test_an_encoder_that_tells_no_images_apart_is_refused(vit: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(vit[0], tmp_path / "copy"))
    weights = {name: torch.zeros_like(w) for name, w in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"copy gives two images the same features"):
        open_guide(copy)


def test_what_is_no_guide_is_told_with_what_is(tmp_path: Path, open_clip: tuple[Path, Any]) -> None:
    with pytest.raises(FileNotFoundError, match="absent is no folder: name one of"):
        open_guide(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"holds notes.txt, which is none of: the --out folder .*open_clip.*codebook.json"
    ):
        open_guide(tmp_path)
    pooled = tmp_path / "pooled"
    open_clip_folder(pooled, attentional_pool=True, attn_pooler_heads=4)
    with pytest.raises(
        ValueError, match=r"vision tower VisionTransformer, and only .* without attention pooling"
    ):
        open_guide(pooled)


def test_language_model_is_no_guide(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 32}
    BertModel(BertConfig(**layers, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no encoder with a square grid of tokens, since its config.json has patch"
    ):
        open_guide(tmp_path)


def test_grid_that_an_encoder_lacks_is_refused(vit: tuple[Path, Any]) -> None:
    guide = open_guide(vit[0])
    guide.tower = Halving()
    with pytest.raises(ValueError, match=r"grid=5 gives 4 tokens of .* instead of 25: choose a multiple"):
        guide(random_views(1, SIZE), 5)


class Halving(torch.nn.Module):
    """An encoder with tokens of 16 pixels that says they have 8."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, WIDTH, 16, stride=16)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.layer(images).flatten(2).mT
        return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
