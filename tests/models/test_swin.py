"""Is Swin timm's own, row by row at every size, and does every backbone put the image's summary first?"""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from pretrain.config import Backbone
from pretrain.models.backbone import build_encoder

PRETRAINED = {  # our size -> timm's name, at its defaults
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
}


def encoder_of(family: str = "swin", image_size: int = 64, **choices) -> nn.Module:
    torch.manual_seed(0)
    choices = {"size": f"{family}_tiny", "drop_path": 0.0, "token_width": 64} | choices
    encoder = build_encoder(Backbone(family, **choices), image_size)
    with torch.no_grad():
        for parameter in encoder.parameters():  # no weight may be idle
            parameter.add_(0.02 * torch.randn_like(parameter))
    return encoder.eval()


@pytest.mark.parametrize("image_size", [64, 160])
def test_tokens_are_those_of_a_swin_made_for_this_size_alone(image_size: int) -> None:
    encoder, images = encoder_of(image_size=image_size), torch.randn(2, 3, image_size, image_size)
    theirs = SwinTransformer(
        image_size, embed_dim=8, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4, num_classes=0
    ).eval()
    assert theirs.patch_embed.strict_img_size  # masks of the windows are made once
    theirs.load_state_dict(encoder.swin.state_dict(), strict=True)
    expected = theirs.forward_features(images)
    grid = image_size // encoder.stride
    assert expected.shape == (2, grid, grid, 64)
    torch.testing.assert_close(
        encoder(images), torch.stack([expected[:, i // grid, i % grid] for i in range(grid**2)], 1)
    )


@pytest.mark.parametrize("size", PRETRAINED)
def test_published_sizes_have_the_tensors_and_windows_of_the_pretrained_models(size: str) -> None:
    with torch.device("meta"):
        ours = encoder_of(size=size, image_size=224).swin
        theirs = timm.create_model(PRETRAINED[size], num_classes=0)
    shapes = [{name: p.shape for name, p in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    windows = [
        [
            (block.window_size, block.shift_size, block.attn.num_heads)
            for stage in m.layers
            for block in stage.blocks
        ]
        for m in (ours, theirs)
    ]
    assert windows[0] == windows[1] and windows[0][1] == (
        (7, 7),
        (3, 3),
        ours.layers[0].blocks[1].attn.num_heads,
    )


def test_published_size_computes_what_the_pretrained_model_does() -> None:
    encoder, images = encoder_of(size="swin_t", image_size=224), torch.randn(1, 3, 224, 224)
    theirs = timm.create_model(PRETRAINED["swin_t"], num_classes=0).eval()
    theirs.load_state_dict(encoder.swin.state_dict(), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), theirs.forward_features(images).reshape(1, 49, 768))


@pytest.mark.parametrize("family", ["swin", "vit"])
def test_a_token_depends_most_on_its_own_place(family: str) -> None:
    encoder, size = encoder_of(family, image_size=128), 128
    images = torch.randn(1, 3, size, size, requires_grad=True)
    grid, tokens = size // encoder.stride, encoder(images)[0]
    assert tokens.shape == (grid**2, encoder.width)
    for place in range(0, grid**2, 3):
        # A sum of weights of its own: the sum of a normalised token does not depend on the image.
        score = (tokens[place] * torch.linspace(-1, 1, encoder.width)).sum()
        (gradient,) = torch.autograd.grad(score, images, retain_graph=True)
        squares = gradient.square().sum((0, 1)).unflatten(0, (grid, -1)).unflatten(2, (grid, -1)).sum((1, 3))
        assert squares.argmax() == place


@pytest.mark.parametrize("size", [32, 96, 128])
def test_images_of_another_size_have_a_token_for_every_square(size: int) -> None:
    encoder = encoder_of(image_size=64)
    assert encoder(torch.randn(1, 3, size, size)).shape == (1, (size // 32) ** 2, 64)


@pytest.mark.parametrize("family", ["internimage", "swin"])
@pytest.mark.parametrize("token_norm", ["none", "batch"])
def test_summary_is_the_mean_of_the_tokens_where_no_class_token_is(family: str, token_norm: str) -> None:
    encoder, images = encoder_of(family, token_norm=token_norm), torch.randn(2, 3, 64, 64)
    together, tokens = encoder(images, summary=True), encoder(images)
    assert together.shape == (2, 1 + tokens.shape[1], encoder.width)
    assert torch.equal(together[:, 1:], tokens)
    torch.testing.assert_close(together[:, 0].double(), tokens.double().mean(1), rtol=1e-5, atol=1e-6)


def test_summary_of_a_vit_is_the_class_token_of_timm() -> None:
    encoder, images = encoder_of("vit"), torch.randn(2, 3, 64, 64)
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        embed_dim=48,
        depth=2,
        num_heads=4,
        num_classes=0,
        global_pool="token",
    ).eval()
    theirs.load_state_dict(encoder.vit.state_dict(), strict=True)
    together = encoder(images, summary=True)
    torch.testing.assert_close(together, theirs.forward_features(images))
    torch.testing.assert_close(together[:, 0], theirs(images))
    assert torch.equal(together[:, 1:], encoder(images))


def test_class_token_is_in_the_statistics_when_it_is_asked_for() -> None:
    encoder, images = encoder_of("vit", token_norm="batch").train(), torch.randn(4, 3, 64, 64)
    together, tokens = encoder(images, summary=True), encoder(images)
    for rows in (together, tokens):
        torch.testing.assert_close(rows.mean((0, 1)), torch.zeros(48), rtol=0, atol=1e-5)
        torch.testing.assert_close(rows.var((0, 1), correction=0), torch.ones(48), rtol=1e-3, atol=0)
    assert not torch.allclose(together[:, 1:], tokens, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "width", "stride", "patch"),
    [("internimage", 64, 16, 16), ("swin", 64, 32, 4), ("vit", 48, 16, 16)],
)
def test_an_encoder_says_what_it_measures(family: str, width: int, stride: int, patch: int) -> None:
    encoder = encoder_of(family)
    assert (encoder.width, encoder.stride, encoder.patch) == (width, stride, patch)


def test_size_that_is_no_multiple_of_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match=r"views\.size=100 must be a multiple of 32, .* swin_tiny: set 96"):
        encoder_of(image_size=100)


@pytest.mark.parametrize("family", ["swin", "vit"])
def test_drop_path_grows_with_depth_or_is_refused(family: str) -> None:
    linear = encoder_of(family, drop_path=0.3, drop_path_schedule="linear")
    rates = [
        m.probability
        for name, m in linear.named_modules()
        if name.endswith("drop_path2") and hasattr(m, "probability")
    ]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.3) and len(set(rates)) == len(rates)
    with pytest.raises(
        ValueError, match=rf"timm's {family} knows 'linear' only: set that, or backbone.drop_path=0"
    ):
        encoder_of(family, drop_path=0.3, drop_path_schedule="uniform")


def test_unknown_family_and_size_list_the_choices() -> None:
    with pytest.raises(
        ValueError, match=r"family='mamba' is unknown; choose from \['internimage', 'swin', 'vit'\]"
    ):
        build_encoder(Backbone("mamba"), 64)
    with pytest.raises(
        ValueError, match=r"size='swin_h' is unknown; choose from \['swin_b', 'swin_s', 'swin_t', "
    ):
        build_encoder(Backbone("swin", "swin_h"), 64)
