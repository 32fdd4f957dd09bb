"""Was a file's model trained to compute as the run's backbone does, and on the same pixels? What its settings say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import timm
import torch

from pretrain.config import Run
from pretrain.initial.layouts import LAYOUTS
from pretrain.models.backbone import BACKBONES

# Nothing that a backbone computes with, or what is resized.
IGNORED = ("drop_path_rate", "drop_path_type", "layer_scale", "use_clip_projector", "window")


def compare_config(config: Mapping[str, Any], layout: str, run: Run, place: str) -> list[str]:
    """What settings tell that no shape does; ValueError where the same weights would compute otherwise.

    They are a config.json, also of our exports, or {"run": run.json} of a checkpoint of ours.
    """
    family, notes = run.backbone.family, []
    size = BACKBONES[family].sizes[run.backbone.size]
    there = _told_size(config, family)
    ours = {name: value for name, value in asdict(size).items() if name not in IGNORED}
    if layout.startswith("Hugging Face ViT"):
        there, ours = config, {"num_attention_heads": size.heads, "hidden_act": "gelu", "qkv_bias": True}
        if (eps := config.get("layer_norm_eps", 1e-6)) != 1e-6:
            notes.append(f"its layer_norm_eps is {eps}, ours 1e-06: features differ a little")
    elif layout == "timm ViT" and (heads := timm_heads(config)) is not None:
        there, ours = {"num_heads": heads}, {"num_heads": size.heads}
    elif LAYOUTS[layout].family == "internimage" and not there:
        there = config
    told = {name: tuple(v) if isinstance(v := there[name], list) else v for name in ours if name in there}
    if differing := [
        (name, v, ours[name]) for name, v in told.items() if (v or None) != (ours[name] or None)
    ]:
        words = ", ".join(f"{name} is {there!r}, here {here!r}" for name, there, here in differing)
        raise ValueError(f"{place} was trained as another model ({words}): choose the backbone that it holds")
    return notes


def compare_pixels(config: Mapping[str, Any], preprocessor: Mapping[str, Any], run: Run) -> list[str]:
    """How the pixels that these settings tell differ from the run's.

    They are `compare_config`'s, of which timm's have their own names, and transformers' preprocessor_config.json.
    """
    views, cfg = _inner(config, "run", "views"), _inner(config, "pretrained_cfg")
    processor = preprocessor.get("image_processor", preprocessor)  # where one of images and texts was saved
    processor = processor if isinstance(processor, Mapping) else {}
    if processor.get("do_normalize") is False:
        processor = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    notes = []
    for name, ours in (("mean", run.views.mean), ("std", run.views.std)):
        found = (processor.get(f"image_{name}"), config.get(f"image_{name}"))
        found += tuple(settings.get(name) for settings in (views, cfg, config))
        theirs = next((one for one in found if one is not None), None)
        if isinstance(theirs, list) and theirs != list(ours):
            notes.append(
                f"its pixels have {name} {theirs}, this run's {list(ours)}: set --views.{name} to these"
            )
    return notes


def _told_size(config: Mapping[str, Any], family: str) -> Mapping[str, Any]:
    """What a run, or our description of a backbone, tells of one of this family; nothing where neither does."""
    backbone = _inner(config, "run", "backbone")
    if backbone.get("family") == family and isinstance(backbone.get("size"), str):
        size = BACKBONES[family].sizes.get(backbone["size"])
        return {} if size is None else asdict(size)
    return _inner(config, "arguments") if config.get("family") == family else {}


def _inner(settings: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """What stands under these names, one in the other; nothing where that is no mapping."""
    for name in names:
        inner = settings.get(name)
        settings = inner if isinstance(inner, Mapping) else {}
    return settings


def timm_heads(config: Mapping[str, Any]) -> int | None:
    """Attention heads of the model that a config.json of timm names; None where it names none; ValueError for what
    is no such file."""
    name, arguments = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"config.json has model_args {arguments!r}, where arguments by name belong: take the file from its "
            "authors again, or remove the entry"
        )
    if not isinstance(name, str) or not timm.is_model(name):
        return None
    if isinstance(heads := arguments.get("num_heads"), int):
        return heads
    with torch.device("meta"):
        model = timm.create_model(name)
    return model.blocks[0].attn.num_heads if hasattr(model, "blocks") else None
