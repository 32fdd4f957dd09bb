"""What does an exported folder say of its backbone and its pixels, for readers without the recipe? config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.export.trained import Trained
from pretrain.models.backbone import BACKBONES
from pretrain.models.internimage import INTERNIMAGE
from pretrain.models.internimage_layouts import config_to_published


def internimage_arguments(trained: Trained) -> dict[str, Any]:
    fields = config_to_published(INTERNIMAGE[trained.run.backbone.size])
    return {name: value for name, value in fields.items() if name != "use_clip_projector"}


def vit_arguments(trained: Trained) -> dict[str, Any]:
    size = BACKBONES["vit"].sizes[trained.run.backbone.size]
    told = {"width": size.width, "depth": size.depth, "heads": size.heads, "patch": size.patch}
    return told | {"image_size": trained.run.views.size}


ARGUMENTS: dict[str, Callable[[Trained], dict[str, Any]]] = {  # by backbone.family
    "internimage": internimage_arguments,
    "vit": vit_arguments,
}


def write_description(trained: Trained, folder: Path, weights: str, **more: Any) -> None:
    """Family, sizes, the file of weights, pixels; `more` stands beside them."""
    family, views = trained.run.backbone.family, trained.run.views
    told = {
        "family": family,
        "arguments": ARGUMENTS[family](trained),
        "weights": weights,
        "image_size": views.size,
        "image_mean": list(views.mean),
        "image_std": list(views.std),
    }
    (folder / "config.json").write_text(json.dumps(told | more, indent=1) + "\n")
