"""Of which parts are the ONNX graphs of an InternImage and of a ViT?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pretrain.export.onnx_parts import Parts, Placed, last_axes, map_axes, token_axes
from pretrain.export.remote_code.internimage_network import InternImageNetwork
from pretrain.export.remote_code.vit_network import ViTNetwork


class Tokens(nn.Module):
    """Maps of the last two stages -> tokens [b, l, d], row by row."""

    def __init__(self, x3: nn.Module, x4: nn.Module) -> None:
        super().__init__()
        self.dcnv3_head_x3, self.dcnv3_head_x4 = x3, x4

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return (self.dcnv3_head_x3(fine) + self.dcnv3_head_x4(coarse)).flatten(2).transpose(1, 2)


def add_internimage(parts: Parts, network: InternImageNetwork, prefix: str) -> list[Placed]:
    """The maps [b, c_i, h_i, w_i] of the stages."""
    (x,) = parts("stem", network.patch_embed, f"{prefix}patch_embed.", [parts.images], [map_axes()])
    maps = []
    for number, stage in enumerate(network.levels):
        for kind, module, name in _steps(number + 1, stage):
            here = f"{prefix}levels.{number}.{name}."
            (x,) = parts(kind, module, here, [x], [last_axes()])
        maps.append(parts.transposed(x, (0, 3, 1, 2)))
        if stage.downsample is not None:
            here = f"{prefix}levels.{number}.downsample."
            (x,) = parts(f"downsample_of_stage_{number + 1}", stage.downsample, here, [x], [last_axes()])
    return maps


def _steps(number: int, stage: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Kind, module and name of all that a stage computes one after the other, before its map."""
    for index, block in enumerate(stage.blocks):
        yield f"block_of_stage_{number}", block, f"blocks.{index}"
        if index in stage.post_norm_ids:
            place = stage.post_norm_ids.index(index)
            yield "norm", stage.post_norms[place], f"post_norms.{place}"
    if stage.norm is not None:
        yield "norm", stage.norm, "norm"


def add_tokens(parts: Parts, maps: list[Placed], x3: nn.Module, x4: nn.Module, prefix: str) -> Placed:
    """The tokens that pre-training reads off the last two maps."""
    rows, columns = Dim("rows"), Dim("columns")
    axes = [map_axes(2 * rows, 2 * columns), map_axes(rows, columns)]
    return parts("tokens", Tokens(x3, x4), prefix, maps[-2:], axes)[0]


class Embedding(nn.Module):
    """Images -> the tokens that a ViT's first block takes [b, 1 + l, width], whatever the grid.

    Position embeddings are resized as timm does, bicubically with antialiasing, which changes nothing at their own
    grid.
    """

    def __init__(self, network: ViTNetwork) -> None:
        super().__init__()
        self.grid, self.patch_embed = network.grid, network.patch_embed
        self.cls_token, self.pos_embed = network.cls_token, network.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images)
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = rest.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=x.shape[-2:], mode="bicubic", antialias=True)
        patches = (x + resized).flatten(2).transpose(1, 2)
        return torch.cat([(self.cls_token + first).expand(x.shape[0], -1, -1), patches], dim=1)


class Split(nn.Module):
    """Tokens behind the last norm -> class token, and patch tokens."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm(tokens)
        return tokens[:, 0], tokens[:, 1:]


def add_vit(parts: Parts, network: ViTNetwork, prefix: str) -> tuple[Placed, ...]:
    """Class token [b, d] and patch tokens [b, l, d]."""
    sides = (network.patch * Dim("rows"), network.patch * Dim("columns"))
    (x,) = parts("embedding", Embedding(network), prefix, [parts.images], [map_axes(*sides)])
    for index, block in enumerate(network.blocks):
        (x,) = parts("block", block, f"{prefix}blocks.{index}.", [x], [token_axes()])
    return parts("split", Split(network.norm), prefix, [x], [token_axes()])
