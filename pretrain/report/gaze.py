"""From where in the image does the last block take what it writes in the middle? Attention, or deformed points."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from pretrain.kernels.dcnv3 import sampling_points
from pretrain.models.internimage_block import DCN_KERNEL, DCNv3, map_linear

DARK, BRIGHT = np.array([24, 20, 60]), np.array([255, 214, 70])  # RGB of nothing and of the most


@contextmanager
def watched(encoder: nn.Module) -> Iterator[list[Float[Tensor, "n g g"]]]:
    """A list that grows by the shares of every batch that passes through the encoder, until the block ends.

    A share is what the middle position draws from each of g x g places, in the mean over heads or groups; they sum
    to 1 but for points outside the image. Nothing of a Swin whose last block has more than one window.
    """
    seen: list[Tensor] = []
    mixers = [module for module in encoder.modules() if isinstance(module, tuple(SHARES))]
    windows = [module for module in encoder.modules() if isinstance(module, SwinTransformerBlock)]
    if windows and tuple(windows[-1].window_size) != tuple(windows[-1].input_resolution):
        mixers = []
    if not mixers:
        yield seen
        return

    def look(module: Any, inputs: tuple[Tensor, ...]) -> None:
        shares = next(of for kind, of in SHARES.items() if isinstance(module, kind))
        seen.append(shares(module, inputs[0]).float().cpu())

    handle = mixers[-1].register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def of_attention(attention: Attention, x: Float[Tensor, "n l c"]) -> Float[Tensor, "n g g"]:
    """Attention of the middle patch to all patches; what it pays to the class token is left out."""
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    grid = int(x.shape[1] ** 0.5)
    first = x.shape[1] - grid * grid
    middle = first + grid // 2 * grid + grid // 2
    logits = attention.q_norm(q)[:, :, middle, None] @ attention.k_norm(k).mT * attention.scale
    shares = logits.float().softmax(dim=-1).mean(dim=1)[:, 0, first:]
    return shares.unflatten(1, (grid, grid)) / shares.sum(dim=1)[:, None, None]


def of_window(attention: WindowAttention, x: Float[Tensor, "n l c"]) -> Float[Tensor, "n h w"]:
    """Attention of the middle patch to all patches of its window."""
    height, width = attention.window_size
    middle = height // 2 * width + width // 2
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = (
        q[:, :, middle, None] @ k.mT * attention.scale + attention._get_rel_pos_bias()[:, :, middle, None]
    )
    return logits.float().softmax(dim=-1).mean(dim=1)[:, 0].unflatten(1, (height, width))


def of_points(convolution: DCNv3, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h w"]:
    """Bilinear weights of the points that the middle position samples, and of itself where it is blended in."""
    depthwise, (_, norm) = convolution.dw_conv
    _, height, width, _ = x.shape
    row, column = height // 2, width // 2
    guide, groups = depthwise(x, norm(None))[:, row, column], convolution.groups
    grid = torch.tensor(sampling_points(DCN_KERNEL, convolution.remove_center)) - DCN_KERNEL // 2
    offset = convolution.offset(guide).float().unflatten(-1, (groups, -1, 2))
    places = (grid.to(offset) + offset) * convolution.offset_scale + offset.new_tensor([column, row])
    weights = convolution.mask(guide).float().unflatten(-1, (groups, -1)).softmax(dim=-1)
    own = torch.zeros_like(weights[..., :1])
    if convolution.center_feature_scale:
        scale = map_linear(
            guide,
            convolution.center_feature_scale_proj_weight,
            convolution.center_feature_scale_proj_bias,
        )
        own = scale.float().sigmoid()[..., None]
    shares = _spread(places.flatten(1, 2), ((1 - own) * weights).flatten(1), height, width)
    shares[:, row, column] += own.sum(dim=(1, 2))
    return shares / groups


def _spread(
    places: Float[Tensor, "n p 2"], weights: Float[Tensor, "n p"], height: int, width: int
) -> Float[Tensor, "n h w"]:
    """Each weight over the four positions around its (x, y) place; what falls outside the map is lost."""
    total = weights.new_zeros(len(places), height * width)
    corner = places.floor()
    for shift in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = corner + corner.new_tensor(shift)
        near = (1 - (places - at).abs()).prod(dim=-1)
        x, y = at.long().unbind(-1)
        is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        index = (y * width + x).clamp(0, height * width - 1)
        total.scatter_add_(1, index, weights * near * is_inside)
    return total.unflatten(1, (height, width))


def picture(shares: Float[Tensor, "g g"]) -> UInt8[np.ndarray, "g g 3"]:
    """The larger a share, the brighter; the largest of the image is brightest."""
    levels = (shares / shares.max().clamp(min=1e-12)).numpy()[..., None]
    return np.rint(DARK + levels * (BRIGHT - DARK)).astype(np.uint8)


SHARES = {Attention: of_attention, WindowAttention: of_window, DCNv3: of_points}
