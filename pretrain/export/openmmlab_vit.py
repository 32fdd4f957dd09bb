"""What does a ViT compute from the tensors that mmsegmentation and mmpretrain name? Both of them, in plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pretrain.export.resized_positions import resize_positions

NORM_EPS = 1e-6
PACKED = {  # weight and bias of the query, key and value projection, then of the output
    "mmseg": ("attn.attn.in_proj_weight", "attn.attn.in_proj_bias", "attn.attn.out_proj"),
    "mmpretrain": ("attn.qkv.weight", "attn.qkv.bias", "attn.proj"),
}


def compute(
    state: Mapping[str, Tensor], toolkit: str, num_heads: int, images: Float[Tensor, "b 3 s s"]
) -> Float[Tensor, "b n d"]:
    """Class token and tokens behind the last norm.

    KeyError for a tensor that is missing, ValueError for one too many.
    """
    state = dict(state)
    kernel = state.pop("patch_embed.projection.weight")
    patches = F.conv2d(images, kernel, state.pop("patch_embed.projection.bias"), stride=kernel.shape[-1])
    positions = resize_positions(state.pop("pos_embed"), patches.shape[-1])
    tokens = torch.cat([state.pop("cls_token").expand(len(images), -1, -1), patches.flatten(2).mT], 1)
    tokens, layer = tokens + positions, 0
    while f"layers.{layer}.ln1.weight" in state:
        own = {name: state.pop(name) for name in list(state) if name.startswith(f"layers.{layer}.")}
        tokens = _layer(
            {name.split(".", 2)[2]: t for name, t in own.items()}, PACKED[toolkit], num_heads, tokens
        )
        layer += 1
    tokens = _norm(tokens, state, "ln1")
    if state:
        raise ValueError(f"a ViT of {toolkit} has no tensors {sorted(state)}")
    return tokens


def _layer(
    state: dict[str, Tensor], packed: tuple[str, str, str], num_heads: int, x: Float[Tensor, "b n d"]
) -> Float[Tensor, "b n d"]:
    rows = F.linear(_norm(x, state, "ln1"), state.pop(packed[0]), state.pop(packed[1]))
    q, k, v = rows.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + _linear(attended, state, packed[2])
    hidden = F.gelu(_linear(_norm(x, state, "ln2"), state, "ffn.layers.0.0"))
    x = x + _linear(hidden, state, "ffn.layers.1")
    if state:
        raise ValueError(f"a layer has no tensors {sorted(state)}")
    return x


def _linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, state.pop(f"{name}.weight"), state.pop(f"{name}.bias"))


def _norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state.pop(f"{name}.weight"), state.pop(f"{name}.bias"), NORM_EPS)
