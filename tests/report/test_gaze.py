"""Are the shares of a gaze those by which the block really mixes?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention

from pretrain.config import Backbone
from pretrain.models.backbone import build_encoder
from pretrain.models.internimage_block import DCNv3
from pretrain.models.internimage_config import INTERNIMAGE
from pretrain.recipes import load
from pretrain.report.gaze import of_attention, of_points, of_window, picture, watched
from tests.fakes import shrink

TINY = INTERNIMAGE["internimage_tiny"]


@pytest.mark.parametrize("has_scale", [False, True])
def test_points_mix_as_the_deformable_convolution_does(has_scale: bool) -> None:
    torch.manual_seed(0)
    config = replace(TINY, center_feature_scale=has_scale)
    convolution = DCNv3(config, 0)
    convolution.groups = convolution.offset.groups = convolution.mask.groups = 1
    width = config.widths[0]
    for layer, outputs in ((convolution.offset, 18), (convolution.mask, 9)):
        layer.weight = torch.nn.Parameter(torch.randn(outputs, width))
        layer.bias = torch.nn.Parameter(torch.randn(outputs))
    if has_scale:
        convolution.center_feature_scale_proj_weight = torch.nn.Parameter(torch.randn(1, width))
        convolution.center_feature_scale_proj_bias = torch.nn.Parameter(torch.randn(1))
    x = torch.randn(2, 5, 4, width)
    with torch.no_grad():
        shares = of_points(convolution, x)
        mixed = torch.einsum("nhw,nhwc->nc", shares, convolution.input_proj(x))
        expected = convolution(x)[:, 2, 2]
    torch.testing.assert_close(convolution.output_proj(mixed), expected, rtol=1e-4, atol=1e-5)
    assert (shares.sum(dim=(1, 2)) <= 1 + 1e-5).all()


def test_attention_mixes_as_the_block_does() -> None:
    torch.manual_seed(0)
    attention = Attention(16, num_heads=1, qkv_bias=True)
    x = torch.randn(2, 25, 16)
    with torch.no_grad():
        shares = of_attention(attention, x)
        values = attention.qkv(x)[..., 32:]
        mixed = torch.einsum("nl,nlc->nc", shares.flatten(1), values)
        torch.testing.assert_close(attention.proj(mixed), attention(x)[:, 12], rtol=1e-4, atol=1e-5)
        assert torch.allclose(
            of_attention(attention, torch.cat([x[:, :1], x], dim=1)).sum((1, 2)), torch.ones(2)
        )


def test_a_window_mixes_as_the_block_does() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(16, num_heads=1, window_size=(3, 4))
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(2, 12, 16)
    with torch.no_grad():
        shares = of_window(attention, x)
        mixed = torch.einsum("nl,nlc->nc", shares.flatten(1), attention.qkv(x)[..., 32:])
        torch.testing.assert_close(attention.proj(mixed), attention(x)[:, 6], rtol=1e-4, atol=1e-5)


def test_of_several_windows_nothing_is_drawn() -> None:
    encoder = build_encoder(
        Backbone("swin", "swin_tiny", drop_path=0.0), 256
    ).eval()  # four windows at the end
    with torch.inference_mode(), watched(encoder) as seen:
        encoder(torch.randn(1, 3, 256, 256))
    assert not seen


@pytest.mark.parametrize("recipe", ["m3i.demo", "m3i.vit_b16", "hvp.swin_t"])
def test_every_batch_of_an_encoder_is_seen_until_the_block_ends(recipe: str) -> None:
    run = shrink(load(recipe))
    encoder = build_encoder(run.backbone, run.views.size).eval()
    images = torch.randn(3, 3, run.views.size, run.views.size)
    with torch.inference_mode(), watched(encoder) as seen:
        encoder(images)
        encoder(images[:1])
    assert [len(shares) for shares in seen] == [3, 1]
    assert seen[0].shape[1] == seen[0].shape[2] and torch.allclose(seen[0][:1], seen[1], atol=1e-5)
    encoder(images)
    assert len(seen) == 2
    colours = picture(seen[0][0])
    assert colours.shape == (*seen[0].shape[1:], 3) and (colours.max(axis=(0, 1)) == [255, 214, 70]).all()
