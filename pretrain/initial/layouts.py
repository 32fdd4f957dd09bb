"""Under which names does each toolkit keep the tensors of our towers?

A layout says for every tensor of ours which of theirs, laid end to end, it is made of, and by which rules theirs may
be left out: nothing else is. Names: InternImage in models/internimage_layouts.py; timm; transformers' ViTModel as
files have it and as version 5 has it in memory; detectron2's ViTDet; the ViT of OpenMMLab.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from pretrain.models import internimage_layouts
from pretrain.models.layer_scale import folded

Names = Collection[str]
State = Mapping[str, Tensor]
HEAD = "a head of other labels"
POOLER = "made for another task than the tokens"
RECOMPUTED = "computed from the sizes"
DECODER = "no part of the backbone in this layout: decoder, text encoder or momentum teacher"


@dataclass(frozen=True)
class Layout:
    family: str | None  # backbone.family of what it holds; None: of any
    speaks: Callable[[Names], bool]  # are these the names of a file of this layout?
    sources: Callable[
        [str], tuple[str, ...]
    ]  # our tensor -> theirs; none where the layout has no place for it
    left: dict[str, str] = field(default_factory=dict)  # begin of theirs, as a pattern -> why it is left out
    prepare: Callable[[State], State] = dict  # their tensors, where they must be made ready


def _ours(name: str) -> tuple[str, ...]:
    return (name,)


def _is_ours(names: Names) -> bool:
    return any(name.startswith(("encoder.dcnv3.", "encoder.vit.", "encoder.swin.")) for name in names)


INTERNIMAGE_PARTS = {  # prefix in our towers -> part of the published layout
    "encoder.dcnv3.": "backbone",
    "encoder.heads.": "tokens",
    "pool.": "pool",
    "norm.": "norm",
    "category.": "head",
}


def _internimage(layout: str, name: str) -> tuple[str, ...]:
    for prefix, part in INTERNIMAGE_PARTS.items():
        if name.startswith(prefix):
            own = name.removeprefix(prefix)
            for hub, kept in internimage_layouts.PARTS[part]:
                if own.startswith(kept):
                    return (internimage_layouts.to_layout_key(hub + own.removeprefix(kept), layout),)
    return ()


def _is_internimage(layout: str, names: Names) -> bool:
    has_stem = any(name.endswith("patch_embed.conv1.weight") for name in names)
    return has_stem and internimage_layouts.detect_layout(names) == layout


def _timm(prefix: str, name: str) -> tuple[str, ...]:
    return (name.removeprefix(prefix),) if name.startswith(prefix) else ()


def _swin_downsampling(state: State) -> State:
    """Swin's own code, and timm before 0.9, keep the step to a stage at the end of the stage before it."""
    if not any(name.startswith("layers.0.downsample.") for name in state):
        return dict(state)
    moved = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"layers\.(\d+)\.(downsample\..+)", name)
        moved[f"layers.{int(match[1]) + 1}.{match[2]}" if match else name] = tensor
    return moved


VIT = "encoder.vit."
VIT_STEM = {  # begin of our name -> theirs
    "huggingface": {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "norm.": "layernorm.",
    },
    "openmmlab": {
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.proj.": "patch_embed.projection.",
        "norm.": "ln1.",
    },
}
VIT_STEM["huggingface 5"] = VIT_STEM["huggingface"]
VIT_STEM["openmmlab qkv"] = VIT_STEM["openmmlab"]
VIT_BLOCK = {  # begin of the block's name, then layer of a block -> theirs
    "huggingface": (
        "encoder.layer.",
        {
            "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
            "attn.proj": ("attention.output.dense",),
            "mlp.fc1": ("intermediate.dense",),
            "mlp.fc2": ("output.dense",),
            "norm1": ("layernorm_before",),
            "norm2": ("layernorm_after",),
        },
    ),
    "huggingface 5": (
        "layers.",
        {
            "attn.qkv": tuple(f"attention.{part}_proj" for part in "qkv"),
            "attn.proj": ("attention.o_proj",),
            "norm1": ("layernorm_before",),
            "norm2": ("layernorm_after",),
        },
    ),
    "openmmlab": (
        "layers.",
        {
            "attn.qkv": ("attn.attn.in_proj_",),
            "attn.proj": ("attn.attn.out_proj",),
            "mlp.fc1": ("ffn.layers.0.0",),
            "mlp.fc2": ("ffn.layers.1",),
            "norm1": ("ln1",),
            "norm2": ("ln2",),
        },
    ),
    "openmmlab qkv": (
        "layers.",
        {"mlp.fc1": ("ffn.layers.0.0",), "mlp.fc2": ("ffn.layers.1",), "norm1": ("ln1",), "norm2": ("ln2",)},
    ),
}


def _vit(style: str, name: str) -> tuple[str, ...]:
    if not name.startswith(VIT):
        return ()
    own = name.removeprefix(VIT)
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", own):
        begin, layers = VIT_BLOCK[style]
        parts = (f"{begin}{match[1]}.{part}" for part in layers.get(match[2], (match[2],)))
        return tuple(f"{part}{'' if part.endswith('_') else '.'}{match[3]}" for part in parts)
    for ours, theirs in VIT_STEM[style].items():
        if own.startswith(ours):
            return (theirs + own.removeprefix(ours),)
    return (own,)


def _without(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _has(*starts: str) -> Callable[[Names], bool]:
    return lambda names: all(any(start in f".{name}" for name in names) for start in starts)


LAYOUTS: dict[str, Layout] = {  # the first that speaks is taken
    "towers of a run": Layout(None, _is_ours, _ours),
    "InternImage": Layout(
        "internimage",
        partial(_is_internimage, "plain"),
        partial(_internimage, "plain"),
        {r"(conv_head|head)\.": HEAD, r"(clip_projector|fc_norm)\.": HEAD},
    ),
    "InternImage, pre-training": Layout(
        "internimage",
        partial(_is_internimage, "pretraining"),
        partial(_internimage, "pretraining"),
        {
            r"clip\.classifier": HEAD,
            r"clip_projector\.": HEAD,
            r"(?!dcnv3\.|dcnv3_head)": DECODER,
        },
    ),
    "InternImage, Hugging Face": Layout(
        "internimage",
        partial(_is_internimage, "huggingface"),
        partial(_internimage, "huggingface"),
        {r"(model\.)?(conv_head|head|classifier|clip_projector|fc_norm)\.": HEAD},
    ),
    "Hugging Face ViT": Layout(
        "vit",
        _has(".encoder.layer.0.attention.attention.query."),
        partial(_vit, "huggingface"),
        {r"pooler\.": POOLER, r"classifier\.": HEAD, r"embeddings\.mask_token$": DECODER},
        partial(_without, "vit."),
    ),
    "Hugging Face ViT, transformers 5": Layout(
        "vit",
        _has(".layers.0.attention.q_proj.", ".embeddings.cls_token"),
        partial(_vit, "huggingface 5"),
        {r"pooler\.": POOLER, r"classifier\.": HEAD, r"embeddings\.mask_token$": DECODER},
        partial(_without, "vit."),
    ),
    "OpenMMLab ViT": Layout(
        "vit",
        _has(".layers.0.attn.attn.in_proj_weight"),
        partial(_vit, "openmmlab"),
        {r"head\.": HEAD},
        partial(_without, "backbone."),
    ),
    "OpenMMLab ViT, MMPretrain": Layout(
        "vit",
        _has(".layers.0.ffn.layers.0.0."),
        partial(_vit, "openmmlab qkv"),
        {r"head\.": HEAD},
        partial(_without, "backbone."),
    ),
    "detectron2 ViTDet": Layout(
        "vit",
        _has(".backbone.net.blocks.0."),
        partial(_timm, VIT),
        {r"head\.": HEAD},
        partial(_without, "backbone.net."),
    ),
    "timm Swin": Layout(
        "swin",
        lambda names: (
            any(name.endswith("attn.relative_position_bias_table") for name in names)
            and any(name.startswith("layers.0.blocks.0.") for name in names)
        ),
        partial(_timm, "encoder.swin."),
        {r"head\.": HEAD, r".+\.(relative_position_index|attn_mask)$": RECOMPUTED},
        _swin_downsampling,
    ),
    "timm ViT": Layout(
        "vit",
        _has(".blocks.0.attn.qkv.", ".patch_embed.proj."),
        partial(_timm, VIT),
        {r"(head|head_dist|pre_logits|fc_norm)\.": HEAD, r"mask_token$": DECODER},
        folded,
    ),
}


def detect(names: Names, place: str) -> str:
    """The layout whose names these are; ValueError when it is none that we know."""
    for name, layout in LAYOUTS.items():
        if layout.speaks(names):
            return name
    raise ValueError(
        f"{place} has names of no layout that is known, such as {sorted(names)[:3]}: give one of {list(LAYOUTS)}"
    )
