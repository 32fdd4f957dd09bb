"""How does the backbone of this folder become one of torchvision's detectors? Needs torch and torchvision alone.

    backbone = torch.hub.load("FOLDER", "backbone", source="local")     # ordered dict of maps, out_channels
    body = torch.hub.load("FOLDER", "body", source="local")             # the same without the pyramid

Images are as torchvision's detectors give them: RGB, normalised by `image_mean` and `image_std` of config.json.
"""

from __future__ import annotations

import importlib.util
import json
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

dependencies = ["torch", "torchvision"]
FOLDER = Path(__file__).resolve().parent


def config() -> dict[str, Any]:
    """config.json of this folder: network, its arguments, pixel statistics."""
    return json.loads((FOLDER / "config.json").read_text())


def body() -> nn.Module:
    """Images [b, 3, h, w] -> ordered dict of maps [b, c, h_i, w_i]: "0" to "3", or "0" alone of a ViT.

    Attribute `widths`: channels of each.
    """
    told = config()
    with torch.device("meta"):
        module = BODIES[told["family"]](_file(told["network"]), told["arguments"])
    weights = torch.load(FOLDER / "backbone.pth", map_location="cpu", weights_only=True, mmap=True)["model"]
    module.network.load_state_dict(weights, strict=True, assign=True)
    return module


def backbone(out_channels: int = 256) -> nn.Module:
    """What MaskRCNN, FasterRCNN, RetinaNet and FCOS take: maps of `out_channels` at strides 4 to 32, then "pool"."""
    inner = body()
    pyramid = SimplePyramid if len(inner.widths) == 1 else StagePyramid
    return WithPyramid(inner, pyramid(inner.widths, out_channels), out_channels)


class InternImageBody(nn.Module):
    """The maps of the stages."""

    def __init__(self, network: ModuleType, arguments: dict[str, Any]):
        super().__init__()
        self.network = network.InternImageNetwork(**arguments)
        self.widths = list(self.network.widths)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(index), one) for index, one in enumerate(self.network(images)))


class ViTBody(nn.Module):
    """The patch tokens as one map."""

    def __init__(self, network: ModuleType, arguments: dict[str, Any]):
        super().__init__()
        self.network = network.ViTNetwork(**arguments)
        self.widths = [arguments["width"]]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        rows, columns = (side // self.network.patch for side in images.shape[-2:])
        tokens = self.network(images)[:, 1:]
        return OrderedDict([("0", tokens.transpose(1, 2).unflatten(2, (rows, columns)))])


BODIES = {"internimage": InternImageBody, "vit": ViTBody}


class WithPyramid(nn.Module):
    """A backbone as torchvision's detectors call it."""

    def __init__(self, body: nn.Module, pyramid: nn.Module, out_channels: int):
        super().__init__()
        self.body, self.pyramid, self.out_channels = body, pyramid, out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.pyramid(self.body(images))


class StagePyramid(FeaturePyramidNetwork):
    """FPN over the maps of the stages (arXiv 1612.03144)."""

    def __init__(self, widths: list[int], out_channels: int):
        super().__init__(widths, out_channels, extra_blocks=LastLevelMaxPool())


class SimplePyramid(nn.Module):
    """Strides 4, 8, 16, 32 from the one map of stride 16, and 64 (ViTDet, arXiv 2203.16527, section 3)."""

    def __init__(self, widths: list[int], out_channels: int):
        super().__init__()
        (width,) = widths
        half, quarter = width // 2, width // 4
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, half, 2, stride=2),
                    LayerNorm(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ),
                nn.ConvTranspose2d(width, half, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.outs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, bias=False),
                LayerNorm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm(out_channels),
            )
            for channels in (quarter, half, width, width)
        )

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        x = maps["0"]
        found = [out(scale(x)) for scale, out in zip(self.scales, self.outs, strict=True)]
        named = OrderedDict((str(index), one) for index, one in enumerate(found))
        named["pool"] = nn.functional.max_pool2d(found[-1], 1, stride=2)
        return named


class LayerNorm(nn.LayerNorm):
    """Over the channels of [b, c, h, w]."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _file(name: str) -> ModuleType:
    """A Python file of this folder, whatever else goes by its name."""
    spec = importlib.util.spec_from_file_location(f"{name}_{abs(hash(FOLDER))}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
