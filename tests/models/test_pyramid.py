"""Do all backbones give heads maps of the strides and widths that they tell?"""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from pretrain.config import Backbone
from pretrain.export.remote_code import hubconf
from pretrain.export.remote_code.simple_pyramid_openmmlab import SimplePyramid
from pretrain.models.backbone import build_encoder
from pretrain.models.pyramid import Pyramid, SimpleFeaturePyramid

SIZES = {
    "internimage": ("internimage_tiny", (4, 8, 16, 32)),
    "swin": ("swin_tiny", (4, 8, 16, 32)),
    "vit": ("vit_tiny", (4, 8, 16, 32)),
}


def pyramid_of(family: str) -> Pyramid:
    torch.manual_seed(0)
    backbone = Backbone(family, SIZES[family][0], 0.0, "linear", token_width=64)
    return Pyramid(build_encoder(backbone, 64), width=24).eval()


@pytest.mark.parametrize("family", SIZES)
def test_maps_have_the_told_widths_and_strides(family: str) -> None:
    pyramid = pyramid_of(family)
    assert pyramid.strides == SIZES[family][1]
    maps = pyramid(torch.randn(2, 3, 64, 96))  # another size than the encoder was made for, and not square
    shapes = [
        (2, width, 64 // stride, 96 // stride)
        for width, stride in zip(pyramid.widths, pyramid.strides, strict=True)
    ]
    assert [tuple(found.shape) for found in maps] == shapes


@pytest.mark.parametrize("family", SIZES)
def test_last_stage_is_what_the_tokens_are_made_of(family: str) -> None:
    """ViT and Swin: the tokens themselves. InternImage: the maps from which the token head makes them."""
    encoder, images = pyramid_of(family).encoder, torch.randn(1, 3, 64, 64)
    maps = encoder.maps(images)
    if hasattr(encoder, "heads"):
        tokens = encoder.heads([stage.permute(0, 2, 3, 1) for stage in maps]).flatten(1, 2)
    else:
        tokens = maps[-1].flatten(2).transpose(1, 2)
    assert torch.equal(tokens, encoder(images))


@pytest.mark.parametrize("family", SIZES)
def test_every_weight_of_the_neck_learns(family: str) -> None:
    pyramid = pyramid_of(family)
    sum(found.square().sum() for found in pyramid(torch.randn(1, 3, 64, 64))).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in pyramid.neck.parameters())


def test_sides_that_do_not_fit_are_told_with_the_rule() -> None:
    with pytest.raises(ValueError, match=r"64 x 80 pixels.*multiples of 32.*pad"):
        pyramid_of("vit")(torch.zeros(1, 3, 64, 80))


def test_the_pyramid_needs_neither_torchvision_nor_transformers() -> None:
    code = (
        "import sys, pretrain.models.pyramid\n"
        "print([name for name in ('timm', 'torchvision', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["torchvision", "openmmlab"])
def test_pyramids_of_exports_compute_as_ours(kind: str) -> None:
    """On maps so small that the norms' epsilon tells."""
    ours = SimpleFeaturePyramid(16, 8)
    maps = 1e-3 * torch.randn(1, 16, 4, 4)
    if kind == "torchvision":
        theirs: nn.Module = hubconf.SimplePyramid([16], 8)
        levels = [nn.ModuleList(pair) for pair in zip(theirs.scales, theirs.outs, strict=True)]
        found = list(theirs(OrderedDict({"0": maps})).values())
    else:
        theirs = SimplePyramid(16, 8)
        levels, found = list(theirs.levels), theirs([maps])
    with torch.no_grad():
        for own, level in zip(ours.levels, levels, strict=True):
            for mine, its in zip(own.parameters(), level.parameters(), strict=True):
                mine.copy_(its)
    for mine, its in zip(ours([maps]), found, strict=False):  # they have one of a coarser grid, too
        torch.testing.assert_close(mine, its)
