"""What do mmsegmentation and mmpretrain call the tensors of a ViT? LayerScale goes into the projections before it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pretrain.models.layer_scale import folded

RENAMED = {  # module of timm's -> of both toolkits
    "norm": "ln1",
    "norm1": "ln1",
    "norm2": "ln2",
    "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1",
    "patch_embed.proj": "patch_embed.projection",
}
ATTENTION = {  # tensor of timm's -> of each toolkit, where they differ
    "mmseg": {
        "attn.qkv.weight": "attn.attn.in_proj_weight",
        "attn.qkv.bias": "attn.attn.in_proj_bias",
        "attn.proj.weight": "attn.attn.out_proj.weight",
        "attn.proj.bias": "attn.attn.out_proj.bias",
    },
    "mmpretrain": {},
}


def vit_tensors(state: Mapping[str, Tensor], toolkit: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """timm's tensors of a ViT under the names of a toolkit, and by those the name that each comes from."""
    tensors, origins = {}, {}
    for key, tensor in folded(state).items():
        name = vit_key(key, toolkit)
        tensors[name], origins[name] = tensor, key
    return tensors, origins


def vit_key(key: str, toolkit: str) -> str:
    """timm's name of a tensor of a ViT -> the toolkit's."""
    prefix = ""
    if key.startswith("blocks."):
        _, index, key = key.split(".", 2)
        prefix = f"layers.{index}."
    if key in ATTENTION[toolkit]:
        return prefix + ATTENTION[toolkit][key]
    module, _, kind = key.rpartition(".")
    return prefix + (f"{RENAMED[module]}.{kind}" if module in RENAMED else key)
