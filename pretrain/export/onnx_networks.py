"""Of which parts are the ONNX graphs of an InternImage and of a ViT?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pretrain.export.onnx_parts import TO_FIRST, TO_LAST, Parts, Placed, last_axes, map_axes, token_axes
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
    stem, here = network.patch_embed, f"{prefix}patch_embed."
    x = parts.convolved(stem.conv1, f"{here}conv1.", parts.images)
    x = parts.normalised(stem.norm1[1], f"{here}norm1.1.", parts.transposed(x, TO_LAST))
    x = parts.transposed(parts.activated(x), TO_FIRST)
    x = parts.transposed(parts.convolved(stem.conv2, f"{here}conv2.", x), TO_LAST)
    x, maps = parts.normalised(stem.norm2[1], f"{here}norm2.1.", x), []
    for number, stage in enumerate(network.levels):
        here = f"{prefix}levels.{number}."
        for index, block in enumerate(stage.blocks):
            kind = f"block_of_stage_{number + 1}"
            (x,) = parts(kind, block, f"{here}blocks.{index}.", [x], [last_axes()])
            if index in stage.post_norm_ids:
                place = stage.post_norm_ids.index(index)
                x = parts.normalised(stage.post_norms[place][0], f"{here}post_norms.{place}.0.", x)
        if stage.norm is not None:
            x = parts.normalised(stage.norm[0], f"{here}norm.0.", x)
        maps.append(parts.transposed(x, TO_FIRST))
        if stage.downsample is not None:
            x = parts.convolved(stage.downsample.conv, f"{here}downsample.conv.", maps[-1])
            x = parts.transposed(x, TO_LAST)
            x = parts.normalised(stage.downsample.norm[1], f"{here}downsample.norm.1.", x)
    return maps


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
