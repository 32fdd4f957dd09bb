"""How does a ViT run become a folder that `timm.create_model("local-dir:FOLDER")` loads?"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pretrain.export.agreement import Agreement, NotProven, compare, random_images
from pretrain.export.keys import Keys
from pretrain.export.trained import Trained
from pretrain.models.backbone import VIT

WEIGHTS = "model.safetensors"
PREFIX = "encoder.vit."
NO_PLACE = "no part of timm's VisionTransformer"
ARCHITECTURES = {  # our size -> timm's name; model_args below say every number again
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_s16": "vit_small_patch16_224",
    "vit_b16": "vit_base_patch16_224",
    "vit_l16": "vit_large_patch16_224",
}


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes model.safetensors and config.json; tells what became of every tensor."""
    state = trained.towers.state_dict()
    tensors = {
        key.removeprefix(PREFIX): tensor.contiguous()
        for key, tensor in state.items()
        if key.startswith(PREFIX)
    }
    # timm takes a file with a top-level mask_token for DINOv2.
    assert "mask_token" not in tensors
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(trained), indent=1) + "\n")
    written = {key: key.removeprefix(PREFIX) for key in state if key.startswith(PREFIX)}
    skipped = {key: NO_PLACE for key in state if not key.startswith(PREFIX)}
    return {WEIGHTS: Keys(written, skipped).require_whole(state, tensors)}


def config(trained: Trained) -> dict:
    """timm's config.json. The model pools the normalised patch tokens, since pre-training reads those."""
    size, views = VIT[trained.run.backbone.size], trained.run.views
    return {
        "architecture": ARCHITECTURES[trained.run.backbone.size],
        "num_classes": 0,
        "num_features": size.width,
        "global_pool": "avg",
        "model_args": {
            "img_size": views.size,
            "patch_size": size.patch,
            "embed_dim": size.width,
            "depth": size.depth,
            "num_heads": size.heads,
            "global_pool": "avg",
            "fc_norm": False,  # the norm stands before pooling, under the name `norm`
            "dynamic_img_size": True,
        },
        "pretrained_cfg": {
            "input_size": [3, views.size, views.size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(views.mean),
            "std": list(views.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "other",
            "description": f"M3I pre-training, recipe {trained.run.name}, {trained.which} of {trained.step}",
        },
    }


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Loads the folder by timm's public call and compares tokens and pooled features at two sizes.

    Raises NotProven.
    """
    import timm

    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except RuntimeError as error:
        raise NotProven(f"timm does not load the folder: {error}") from error
    if model.state_dict().keys() != load_file(folder / WEIGHTS).keys():
        raise NotProven(f"timm's model and {WEIGHTS} hold different tensors")
    agreements = []
    for size in (trained.run.views.size, trained.run.views.size + 2 * trained.towers.encoder.stride):
        images = random_images(size)
        ours = trained.towers.encoder(images)
        theirs = model.forward_features(images)[:, model.num_prefix_tokens :]
        agreements.append(compare(WEIGHTS, "tokens", size, ours, theirs))
        agreements.append(compare(WEIGHTS, "pooled features", size, ours.mean(dim=1), model(images)))
    return agreements


def how_to_load(trained: Trained) -> str:
    """For the model card."""
    return "\n".join(
        (
            "```python",
            "import timm",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            "```",
            "",
            "`model(images)` is the mean of the normalised patch tokens; give `num_classes=` for a new classifier.",
            "The class token is there and was never given a target. Other image sizes work as they are.",
        )
    )
