"""How does a ViT run become a folder that transformers' `AutoModel.from_pretrained(FOLDER)` loads as ViTModel?

Keys are those of transformers 4, which 5 renames in memory. ViTModel has no LayerScale: its factors go into the
projections before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.export.agreement import Agreement, compare, random_images
from pretrain.export.keys import Keys
from pretrain.export.names import NotProven
from pretrain.export.preprocessor import write_preprocessor
from pretrain.export.resized_positions import with_resized_positions
from pretrain.export.trained import Trained
from pretrain.models.backbone import BACKBONES
from pretrain.models.layer_scale import FOLDED, folded

WEIGHTS = "model.safetensors"
PREFIX = "encoder.vit."  # of the model's tensors in our towers
NO_PLACE = "no part of transformers' ViTModel"
NORM_EPS = 1e-6  # of timm's ViT; ViTConfig's own default is 1e-12
SPLIT = {"attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value")}
RENAMED = {  # module of ours -> of ViTModel
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
WHOLE = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes model.safetensors, config.json and preprocessor_config.json; tells what became of every tensor."""
    state = trained.towers.state_dict()
    ours = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}
    tensors, origins = classic_keys(ours)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config(trained), indent=1) + "\n")
    write_preprocessor(trained.run.views, folder)
    written, added, skipped = {}, {}, {}
    for key, origin in origins.items():
        if f"{PREFIX}{origin}" in written:
            added[key] = f"a further part of {PREFIX}{origin}"
        else:
            written[f"{PREFIX}{origin}"] = key
    for key in state.keys() - written.keys():
        is_scale = key.startswith(PREFIX) and ".ls" in key
        skipped[key] = FOLDED if is_scale else NO_PLACE
    return {WEIGHTS: Keys(written, skipped, added).require_whole(state, tensors)}


def classic_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """timm's tensors of a ViT under ViTModel's names, and by those the name that each comes from."""
    tensors, origins = {}, {}
    for key, tensor in folded(state).items():
        for name, part in _renamed(key, tensor):
            tensors[name], origins[name] = part, key
    return tensors, origins


def _renamed(key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if key in WHOLE:
        return [(WHOLE[key], tensor)]
    module, kind = key.rsplit(".", 1)
    prefix = ""
    if module.startswith("blocks."):
        _, index, module = module.split(".", 2)
        prefix = f"encoder.layer.{index}."
    if module in SPLIT:
        parts = zip(SPLIT[module], tensor.chunk(3), strict=True)
        return [(f"{prefix}{name}.{kind}", part) for name, part in parts]
    return [(f"{prefix}{RENAMED[module]}.{kind}", tensor)]


def config(trained: Trained) -> dict[str, Any]:
    """transformers' config.json."""
    run = trained.run
    size = BACKBONES[run.backbone.family].sizes[run.backbone.size]
    block = trained.towers.encoder.vit.blocks[0]
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": NORM_EPS,
        "image_size": run.views.size,
        "patch_size": size.patch,
        "num_channels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Loads the folder by transformers' public call, strictly, and compares every token at two sizes.

    The second size is four patches larger, and the position embedding resized as transformers does. Raises
    NotProven.
    """
    model, encoder = load(folder), trained.towers.encoder
    agreements = []
    for size in (trained.run.views.size, trained.run.views.size + 4 * encoder.stride):
        images = random_images(size)
        theirs = model(images, interpolate_pos_encoding=True).last_hidden_state
        ours = with_resized_positions(encoder, images)
        agreements += [
            compare(WEIGHTS, "class token", size, ours[:, 0], theirs[:, 0]),
            compare(WEIGHTS, "tokens", size, ours[:, 1:], theirs[:, 1:]),
        ]
    return agreements


def load(folder: Path) -> nn.Module:
    """ViTModel without its pooler; NotProven unless every key finds its place."""
    from transformers import AutoModel

    try:
        model, told = AutoModel.from_pretrained(
            folder, add_pooling_layer=False, local_files_only=True, output_loading_info=True
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise NotProven(f"transformers does not load the folder: {error}") from error
    wrong = {name: sorted(map(str, keys)) for name, keys in told.items() if keys}
    if wrong:
        raise NotProven(f"transformers does not load the folder strictly: {wrong}")
    return model.eval()


def how_to_load(trained: Trained) -> str:
    """For the model card."""
    return "\n".join(
        (
            "```python",
            "from transformers import AutoImageProcessor, AutoModel",
            "",
            'processor = AutoImageProcessor.from_pretrained("FOLDER")',
            'model = AutoModel.from_pretrained("FOLDER", add_pooling_layer=False)',
            'inputs = processor(image, return_tensors="pt")',
            "tokens = model(**inputs, interpolate_pos_encoding=True).last_hidden_state",
            "```",
            "",
            "The first token is the class token. ViTModel's pooler (a linear layer and tanh on it) is no part of "
            "pre-training: without `add_pooling_layer=False` transformers makes one of random weights, so do not "
            "read `pooler_output`. `AutoModelForImageClassification` takes the same folder with a new classifier.",
            "For images of other sizes transformers resizes the position embedding without antialiasing, timm with "
            "it: there this folder and `--to timm` differ a little.",
        )
    )
