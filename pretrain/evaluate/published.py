"""How does an exported or published file become an encoder that the protocols can read?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.config import Views
from pretrain.evaluate.published_encoder import (
    CONFIG,
    DEFAULT_SIZE,
    Published,
    PublishedEncoder,
    finite_tensors,
    proven_size,
    require_same_pixels,
    told_by,
)
from pretrain.evaluate.published_internimage import open_internimage
from pretrain.evaluate.published_onnx import is_graph, open_graph_of
from pretrain.evaluate.published_vit import open_vit
from pretrain.export.names import FORMATS
from pretrain.export.preprocessor import PREPROCESSOR, read_preprocessor
from pretrain.initial.blocks import require_no_more_blocks
from pretrain.initial.bounds import explained_by, require_numbers, require_pixels, require_statistics
from pretrain.initial.files import KEYS, own_file, weights_in
from pretrain.models import internimage_layouts as layouts
from pretrain.models.guides import ENCODERS, open_guide
from pretrain.models.internimage_config import InternImageConfig
from pretrain.models.pooling import prepend_mean

PLAIN_FILE = "internimage.pth"
DESCRIBED = (
    "openmmlab",
    "detectron2",
)  # of these formats, which tell of the backbone in our config.json alone
FAMILIES: dict[str, Callable[[Path, Mapping[str, Any], Views], Published]] = {
    "internimage": open_internimage,
    "vit": open_vit,
}
# What of transformers' config.json is the published constructor's.
CONSTRUCTOR = {f.name for f in fields(InternImageConfig)} | {"level2_post_norm", *layouts.PUBLISHED_CHOICES}


def open_published(place: Path, size: int | None = None) -> Published:
    """The encoder of an export or a published model at `place`, a folder or the file in it; float32, on the CPU.

    No code of the folder is run, nothing is fetched. `size` of the images in pixels; what the files tell if left
    out. ValueError for a folder of no known kind, for weights that do not fit and for an export whose files tell of
    different pixels, FileNotFoundError without files.
    """
    folder = place if place.is_dir() else place.parent
    found = _opened(place, folder, size)
    require_same_pixels(folder, found.views)
    return found


def _opened(place: Path, folder: Path, size: int | None) -> Published:
    config = told_by(folder, CONFIG)
    told = told_by(folder, KEYS)
    _require_served(folder, told.get("format"), config)
    if is_graph(place, told, config):
        return open_graph_of(place, config, size)
    if "architecture" in config:
        return _open_timm(folder, config, size)
    if "family" in config and "arguments" in config:
        return _open_described(place, config, size)
    if config.get("model_type", "internimage") == "internimage" and "channels" in config:
        return _open_internimage(place, config, size)
    if not any(known.is_folder(folder) for known in ENCODERS.values()):
        raise ValueError(
            f"{place} is no model that is evaluated, as {folder / CONFIG} {'tells of' if config else 'is'} none: "
            f"name an export --to one of {', '.join(FORMATS)}, or a folder of timm, Hugging Face or open_clip with "
            "the settings beside its weights"
        )
    guide = open_guide(folder)
    views = Views(size=size or guide.patch * guide.grid, mean=tuple(guide.mean), std=tuple(guide.std))
    return Published(PublishedEncoder(guide.tower, _of_tower, views.size), views, folder)


def _require_served(folder: Path, name: Any, config: Mapping[str, Any]) -> None:
    """ValueError for exports of a format that is not known, and for those of before that tell too little."""
    if name in (None, *FORMATS) and (config or name not in DESCRIBED):
        return
    why = f"has no {CONFIG}, as those of before" if name in DESCRIBED else "is not evaluated here"
    raise ValueError(
        f"{folder} is an export --to {name}, which {why}: name the run itself, or export it --to one of "
        f"{', '.join(FORMATS)} that holds it"
    )


def _open_described(place: Path, config: Mapping[str, Any], size: int | None) -> Published:
    """An export whose config.json tells family, arguments and pixels."""
    folder = place if place.is_dir() else place.parent
    name, arguments = config["family"], config["arguments"]
    if name not in FAMILIES or not isinstance(arguments, Mapping):
        raise ValueError(
            f"{folder / CONFIG} tells a backbone of the family {name!r} with arguments {arguments!r}, which must be "
            f"one of {sorted(FAMILIES)} with arguments by name: export it again"
        )
    mean, std = require_statistics(config.get("image_mean"), config.get("image_std"), folder / CONFIG)
    side = size or config.get("image_size", proven_size(folder))  # exports of before do not tell it
    views = Views(size=require_pixels(side, folder / CONFIG), mean=mean, std=std)
    weights = config.get("weights")
    file = place if place.is_file() else own_file(folder, weights) if weights else weights_in(folder)
    return FAMILIES[name](file, arguments, views)


def _open_internimage(place: Path, config: Mapping[str, Any], size: int | None) -> Published:
    """An `internimage` export, or a folder of transformers' InternImage, ours or the published one."""
    is_of_transformers = "model_type" in config
    if place.is_file():
        file = place
    elif is_of_transformers:
        file = weights_in(place)
    elif not (file := place / PLAIN_FILE).exists():
        raise FileNotFoundError(
            f"{file} is missing: name a folder of `python -m pretrain.export --to internimage`"
        )
    else:
        file = own_file(place, PLAIN_FILE)
    own = {name: value for name, value in config.items() if name in CONSTRUCTOR or not is_of_transformers}
    pixels = read_preprocessor(file.parent)  # exports of before have none
    if pixels:
        require_statistics(pixels.mean, pixels.std, file.parent / PREPROCESSOR)
    views = replace(pixels or Views(), size=size or (pixels.size if pixels else proven_size(file.parent)))
    return open_internimage(file, own, views)


def is_published(place: Path) -> bool:
    """Does it look like an export or a published model?"""
    folder = place if place.is_dir() else place.parent
    return any((folder / name).is_file() for name in (CONFIG, KEYS, "open_clip_config.json"))


def _open_timm(folder: Path, config: Mapping[str, Any], size: int | None) -> Published:
    import timm

    told, placed = config.get("pretrained_cfg", {}), {"device", "dtype", "cache_dir", "checkpoint_path"}
    options = {} if size is None else {"img_size": size}
    tensors = finite_tensors(folder)
    # Not timm's own reading of the folder, which checks no file; without a source it takes these tensors.
    given = {"source": "", "state_dict": tensors}
    arguments = config.get("model_args") or {}
    is_sound = isinstance(arguments, Mapping) and not any(
        name in placed or name.startswith("pretrained")  # pretrained_strict would leave weights as they start
        for name in arguments
    )
    if not is_sound:
        raise ValueError(
            f"{folder / CONFIG} has model_args {arguments!r}, which must be arguments by name without "
            f"{sorted(placed)} or what begins with 'pretrained': take the file from its authors again"
        )
    if not isinstance(told, Mapping):
        raise ValueError(f"{folder / CONFIG} has pretrained_cfg {told!r}, which must be settings by name")
    mean, std = require_statistics(
        *(told.get(name, getattr(Views, name)) for name in ("mean", "std")), folder / CONFIG
    )
    views = Views(size=size or require_pixels(_side_of(told, folder), folder), mean=mean, std=std)
    require_numbers(arguments, folder / CONFIG)
    try:
        with torch.device("meta"), explained_by(tensors, folder):
            timm.create_model(f"local-dir:{folder}")
        with _noting_keys() as noted:
            trunk = timm.create_model(
                f"local-dir:{folder}", pretrained=True, pretrained_cfg_overlay=given, **options
            )
        trunk.reset_classifier(0)
    except (RuntimeError, TypeError, FileNotFoundError, AttributeError, AssertionError) as error:
        raise ValueError(f"timm does not open {folder}: {error}; export or save it again") from error
    own = trunk.state_dict().keys()
    missing, unexpected = noted.get(trunk, (own, ()))
    if lacking := [name for name in missing if name in own]:
        raise ValueError(
            f"{folder} lacks {len(lacking)} weights of {type(trunk).__name__}, such as {lacking[0]}, for which timm "
            "would leave random numbers: save the whole model again"
        )
    require_no_more_blocks(folder, own, unexpected)
    return Published(PublishedEncoder(trunk.eval(), _of_timm, views.size), views)


@contextmanager
def _noting_keys() -> Iterator[dict[nn.Module, tuple[list[str], list[str]]]]:
    """Within it the weights that each model does not find in what it loads, and those that it has no place for.

    Timm is not strict with a file of other labels, and with some of its models never.
    """
    load, noted = nn.Module.load_state_dict, {}

    def noting(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        found = load(module, *arguments, **options)
        noted[module] = (found.missing_keys, found.unexpected_keys)
        return found

    nn.Module.load_state_dict = noting
    try:
        yield noted
    finally:
        nn.Module.load_state_dict = load


def _side_of(told: Mapping[str, Any], folder: Path) -> Any:
    shape = told.get("input_size", (3, DEFAULT_SIZE, DEFAULT_SIZE))
    if not isinstance(shape, list | tuple) or len(shape) != 3:
        raise ValueError(f"{folder / CONFIG} has input_size {shape!r}, which must be [3, height, width]")
    require_pixels(shape[1], folder)
    return shape[2]


def _of_timm(model: nn.Module, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n d"]:
    features = model.forward_features(images)
    if features.ndim == 4:  # channels last, as Swin's, or second
        is_last = features.shape[-1] == model.num_features
        features = features.flatten(1, 2) if is_last else features.flatten(2).transpose(1, 2)
    prefix = getattr(model, "num_prefix_tokens", 0)
    patches = features[:, prefix:]
    return torch.cat([features[:, :1], patches], dim=1) if prefix else prepend_mean(patches)


def _of_tower(tower: nn.Module, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n d"]:
    return tower(images)
