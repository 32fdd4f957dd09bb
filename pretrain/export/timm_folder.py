"""How does a ViT or Swin run become a folder that `timm.create_model("local-dir:FOLDER")` loads?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain.config import Run
from pretrain.export.agreement import Agreement, compare, random_images
from pretrain.export.keys import Keys
from pretrain.export.names import NotProven
from pretrain.export.own_features import own_features
from pretrain.export.trained import Trained
from pretrain.models.backbone import BACKBONES

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Layout:
    """What timm's models of one family differ in. Each pools the normalised tokens, which pre-training reads."""

    prefix: str  # of the model's tensors in our towers
    model: str  # timm's class
    architectures: dict[str, str]  # our size -> timm's name; the size says every number again
    classifier: str  # module that timm replaces for other classes
    outputs: Callable[[nn.Module, Tensor], dict[str, Tensor]]  # what timm's model gives for images
    remarks: Callable[[Run], str]  # for the model card


def vit_outputs(model: nn.Module, images: Float[Tensor, "b 3 s s"]) -> dict[str, Tensor]:
    features = model.forward_features(images)
    return {"class token": features[:, 0], "tokens": features[:, 1:], "pooled features": model(images)}


def vit_remarks(run: Run) -> str:
    has_target = any(target.summary for target in run.objective.targets.values())
    told = "is trained: `model.forward_features(images)[:, 0]`" if has_target else "was never given a target"
    return f"The class token {told}. Other image sizes work as they are."


def swin_outputs(model: nn.Module, images: Float[Tensor, "b 3 s s"]) -> dict[str, Tensor]:
    return {"tokens": model.forward_features(images).flatten(1, 2), "pooled features": model(images)}


def swin_remarks(run: Run) -> str:
    return (
        f"There is no class token. Images of other sizes work as they are, in windows chosen for {run.views.size} "
        "pixels; sides that are no multiple of the stride are padded. With `img_size=` timm chooses the windows of "
        "that size instead: shifted ones in every stage that is larger than a window, and another table of relative "
        "positions, interpolated, in one that is smaller."
    )


LAYOUTS = {  # by backbone.family
    "vit": Layout(
        prefix="encoder.vit.",
        model="VisionTransformer",
        architectures={
            "vit_tiny": "vit_tiny_patch16_224",
            "vit_s16": "vit_small_patch16_224",
            "vit_b16": "vit_base_patch16_224",
            "vit_l16": "vit_large_patch16_224",
        },
        classifier="head",
        outputs=vit_outputs,
        remarks=vit_remarks,
    ),
    "swin": Layout(
        prefix="encoder.swin.",
        model="SwinTransformer",
        architectures={
            "swin_tiny": "swin_tiny_patch4_window7_224",
            "swin_t": "swin_tiny_patch4_window7_224",
            "swin_s": "swin_small_patch4_window7_224",
            "swin_b": "swin_base_patch4_window7_224",
        },
        classifier="head.fc",
        outputs=swin_outputs,
        remarks=swin_remarks,
    ),
}


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes model.safetensors and config.json; tells what became of every tensor."""
    layout, state = LAYOUTS[trained.run.backbone.family], trained.towers.state_dict()
    written = {key: key.removeprefix(layout.prefix) for key in state if key.startswith(layout.prefix)}
    tensors = {theirs: state[ours].contiguous() for ours, theirs in written.items()}
    # timm takes a file with a top-level mask_token for DINOv2.
    assert "mask_token" not in tensors
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(trained), indent=1) + "\n")
    skipped = {key: f"no part of timm's {layout.model}" for key in state if key not in written}
    return {WEIGHTS: Keys(written, skipped).require_whole(state, tensors)}


def config(trained: Trained) -> dict[str, Any]:
    """timm's config.json."""
    run, layout = trained.run, LAYOUTS[trained.run.backbone.family]
    size, views = BACKBONES[run.backbone.family].sizes[run.backbone.size], run.views
    return {
        "architecture": layout.architectures[run.backbone.size],
        "num_classes": 0,
        "num_features": size.width,
        "global_pool": "avg",
        "model_args": {"img_size": views.size, "global_pool": "avg", **size.arguments},
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
            "classifier": layout.classifier,
            "license": "other",
            "description": f"M3I pre-training, recipe {run.name}, {trained.which} of {trained.step}",
        },
    }


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Loads the folder by timm's public call and compares what it gives at two sizes.

    Raises NotProven.
    """
    import timm

    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except RuntimeError as error:
        raise NotProven(f"timm does not load the folder: {error}") from error
    if model.state_dict().keys() != load_file(folder / WEIGHTS).keys():
        raise NotProven(f"timm's model and {WEIGHTS} hold different tensors")
    agreements, encoder = [], trained.towers.encoder
    for size in (trained.run.views.size, trained.run.views.size + 2 * encoder.stride):
        theirs = LAYOUTS[trained.run.backbone.family].outputs(model, random_images(size))
        own = own_features(trained, size)
        ours = {
            "class token": own["summary"],
            "tokens": own["tokens"],
            "pooled features": own["tokens"].mean(dim=1),
        }
        agreements += [compare(WEIGHTS, key, size, ours[key], theirs[key]) for key in theirs]
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
            "`model(images)` is the mean of the normalised tokens; give `num_classes=` for a new classifier.",
            LAYOUTS[trained.run.backbone.family].remarks(trained.run),
        )
    )
