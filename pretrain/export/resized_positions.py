"""What does our ViT compute where a toolkit resizes the position embedding in its own way?

transformers and mmsegmentation: bicubic without antialiasing. timm, and so pre-training: with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def with_resized_positions(encoder: nn.Module, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n d"]:
    """Class token and tokens of a ViTEncoder, its position embedding resized without antialiasing."""
    vit, grid = encoder.vit, images.shape[-1] // encoder.stride
    before, resized = vit.patch_embed.grid_size, {"vit.pos_embed": resize_positions(vit.pos_embed, grid)}
    vit.patch_embed.grid_size = (grid, grid)  # what timm takes the position embedding to be made for
    try:
        return torch.func.functional_call(encoder, resized, (images,), {"summary": True})
    finally:
        vit.patch_embed.grid_size = before


def resize_positions(positions: Float[Tensor, "1 l d"], grid: int) -> Float[Tensor, "1 m d"]:
    """Bicubic without antialiasing, to grid x grid; the class token's position stays."""
    side = round((positions.shape[1] - 1) ** 0.5)
    if grid == side:
        return positions
    patches = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], patches.flatten(2).mT], dim=1)
