"""How do the maps of a ViT become a pyramid? For mmsegmentation and mmdetection 3.x: `custom_imports`.

Source: "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv 2203.16527), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

try:
    from mmengine.registry import MODELS

    register = MODELS.register_module(name="SimplePyramid")
except ImportError:  # the module alone serves too

    def register(module):
        return module


@register
class SimplePyramid(nn.Module):
    """Maps [b, in_channels, h, w] at stride 16 -> `num_outs` maps of `out_channels`.

    As many maps as levels serve one each; else the last serves all, as published. Strides are 4, 8, 16, 32 (from
    `first` on), each made by its own deconvolutions or pooling and two convolutions with LayerNorm; further ones by
    pooling the last.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, num_outs: int = 5, first: int = 0):
        super().__init__()
        half, quarter = in_channels // 2, in_channels // 4
        resize = [
            nn.Sequential(
                nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                ChannelNorm(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, stride=2),
            ),
            nn.ConvTranspose2d(in_channels, half, 2, stride=2),
            nn.Identity(),
            nn.MaxPool2d(2),
        ]
        widths = [quarter, half, in_channels, in_channels]
        self.levels = nn.ModuleList(
            nn.Sequential(
                resized,
                nn.Conv2d(width, out_channels, 1, bias=False),
                ChannelNorm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                ChannelNorm(out_channels),
            )
            for resized, width in zip(resize[first:], widths[first:], strict=True)
        )
        self.num_outs = num_outs

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(maps) != len(self.levels):
            maps = [maps[-1]] * len(self.levels)
        outputs = [level(own) for level, own in zip(self.levels, maps, strict=True)]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return tuple(outputs)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [b, c, h, w]."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
