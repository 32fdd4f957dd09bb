"""Which backbone do dense heads start from? That of a checkpoint or of an export of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain import written
from pretrain.checkpoint import load_towers
from pretrain.config import Backbone, Views
from pretrain.evaluate.checkpoints import weights_of
from pretrain.evaluate.published_encoder import EncoderAlone, finite_tensors, told_by
from pretrain.evaluate.subjects import open_model
from pretrain.export.names import FORMATS, GRAPHS
from pretrain.export.safetensors_file import WEIGHTS
from pretrain.initial.bounds import explained_by, require_numbers, require_pixels, require_statistics
from pretrain.initial.files import KEYS, digest_of, own_file
from pretrain.initial.fit import fill, fit
from pretrain.initial.layouts import detect
from pretrain.models.backbone import build_encoder
from pretrain.models.undrawn import undrawn

NEEDED = {"backbone": ("family", "size", "token_width"), "views": ("size", "mean", "std")}  # of keys.json
REMEDY = "export the run again, or name the run itself"


@dataclass(frozen=True)
class Pretrained:
    """A trunk, and what a dense model is built by beside it. What follows the trunk may hold any numbers."""

    backbone: Backbone
    views: Views  # of which the size, mean and std of the images are meant
    encoder: nn.Module  # float32, eval mode, on the CPU
    weights: str  # SHA-256, by which others under the same name are told from them


def open_pretrained(place: Path) -> Pretrained:
    """Of a checkpoint's folder, or of an export to any format that holds weights, its folder or a file in it.

    ValueError for what tells no backbone of ours, is damaged or hostile, or does not fit; FileNotFoundError.
    """
    if (place / "run.json").is_file():
        run, _, towers = load_towers(place, parts=("encoder",))
        return Pretrained(run.backbone, run.views, towers.encoder, weights_of(place))
    folder = place if place.is_dir() else place.parent
    if (folder / WEIGHTS).exists():
        subject, file = open_model(place, None), folder / WEIGHTS if place.is_dir() else place
        return Pretrained(subject.run.backbone, subject.run.views, subject.towers.encoder, digest_of(file))
    told = told_by(folder, KEYS)
    _require_trainable(place, told.get("format"))
    backbone, views = _described(told, folder / KEYS)
    file = _file_of(place, told)
    return Pretrained(backbone, views, _encoder(file, backbone, views.size), digest_of(file))


def _require_trainable(place: Path, name: Any) -> None:
    """ValueError for a model that is not ours, and for a format without weights."""
    if name not in FORMATS:
        raise ValueError(
            f"{place} is no export of ours, whose {KEYS} would tell the backbone whose maps heads read: name a run, "
            "one of its checkpoints or exports; weights of others begin a run by --init, which can be named"
        )
    if name in GRAPHS:
        others = ", ".join(one for one in FORMATS if one not in GRAPHS)
        raise ValueError(
            f"{place} is an export --to {name}, a graph whose weights cannot be trained: name the run itself, or "
            f"export it --to one of {others} that holds it"
        )


def _described(told: Mapping[str, Any], path: Path) -> tuple[Backbone, Views]:
    """What an export tells of its backbone and images; ValueError where that lacks a part, or is not sound."""
    for name, fields in NEEDED.items():
        if not isinstance(told.get(name), Mapping) or not told[name].keys() >= set(fields):
            raise ValueError(
                f"{path} does not tell {', '.join(fields)} of the {name}, as exports of before: {REMEDY}"
            )
    require_numbers(told["backbone"], path)
    try:
        backbone = written.from_json(Backbone, json.dumps(told["backbone"]))
        views = written.from_json(Views, json.dumps(told["views"]))
    except ValueError as error:
        raise ValueError(f"{path} tells no backbone that can be built ({error}): {REMEDY}") from error
    require_pixels(views.size, path, REMEDY)
    require_statistics(views.mean, views.std, path)
    return backbone, views


def _file_of(place: Path, told: Mapping[str, Any]) -> Path:
    """The file of weights that is named, of a folder the first of its export."""
    folder, files = place if place.is_dir() else place.parent, told.get("files")
    if not isinstance(files, Mapping) or not files:
        raise ValueError(f"{folder / KEYS} tells files={files!r}, where weights by file belong: {REMEDY}")
    name = next(iter(files)) if place.is_dir() else place.name
    if name not in files:
        raise ValueError(
            f"{place} is none of the files of weights of its export: name {list(files)}, or {folder}"
        )
    if not (folder / name).exists():
        raise FileNotFoundError(f"{folder / name} is missing: copy the export again, or {REMEDY}")
    return own_file(folder, name)


def _encoder(file: Path, backbone: Backbone, size: int) -> nn.Module:
    """The encoder with the trunk of a file; ValueError unless every tensor finds its place, as large as it is."""
    state = finite_tensors(file)
    built = replace(backbone, drop_path=0.0, token_norm="none")  # exports have it folded into the weights
    try:
        with torch.device("meta"), explained_by(state, file):
            build_encoder(built, size)
        with undrawn():
            alone = EncoderAlone(build_encoder(built, size))
        fitted = fit(state, detect(state, str(file)), alone, backbone.family, False, str(file))
        if fitted.resized:
            name, how = next(iter(fitted.resized.items()))
            raise ValueError(f"{name} would be resized, {how}: the images were of another size")
        fill(alone, fitted)
    except (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(
            f"{file} does not fit the backbone that its {KEYS} tells of: {REMEDY} ({error})"
        ) from error
    return alone.encoder.requires_grad_(False).eval()
