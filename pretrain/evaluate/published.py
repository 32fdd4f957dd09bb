"""How does an exported or published file become an encoder that the protocols can read?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.config import Views
from pretrain.export.preprocessor import PREPROCESSOR, read_preprocessor
from pretrain.initial.bounds import explained_by, require_numbers, require_pixels, require_statistics
from pretrain.initial.files import open_weights, own_file, read_json
from pretrain.initial.one_image import try_image
from pretrain.models import internimage_layouts as layouts
from pretrain.models.guides import open_guide
from pretrain.models.internimage import InternImage, StrideTokens
from pretrain.models.internimage_config import InternImageConfig
from pretrain.models.pooling import prepend_mean

CONFIG, PLAIN_FILE = "config.json", "internimage.pth"
KEYS = "keys.json"  # of an export: its format, and how it was proven
SERVED = ("timm", "internimage", "safetensors")  # formats that every run fits one of
DEFAULT_SIZE = 224  # pixels, where no file tells the size of the images


class PublishedEncoder(nn.Module):
    """Tokens of another model, as our encoders give them: images [b, 3, s, s] -> [b, l, width], row by row.

    With `summary` [b, 1 + l, width]: before them the class token, else the mean of the tokens.
    """

    def __init__(self, trunk: nn.Module, tokens: Callable[[nn.Module, Tensor], Tensor], size: int) -> None:
        super().__init__()
        require_pixels(size, Path("the model"))
        self.trunk, self._tokens = trunk.requires_grad_(False).eval(), tokens
        found = try_image(partial(tokens, trunk), size, "the model")
        side = isqrt(found.shape[1] - 1)
        if side**2 != found.shape[1] - 1:
            raise ValueError(
                f"the model gives {found.shape[1] - 1} tokens of {size} pixels, which are no square grid: give "
                "another --image-size"
            )
        self.width, self.stride = found.shape[2], size // side

    def forward(self, images: Float[Tensor, "b 3 s s"], summary: bool = False) -> Float[Tensor, "b n d"]:
        found = self._tokens(self.trunk, images)
        return found if summary else found[:, 1:]


class EncoderAlone(nn.Module):
    """What is asked of towers, of an encoder without heads and texts."""

    has_embedding = has_texts = has_categories = False

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


@dataclass(frozen=True)
class Published:
    encoder: PublishedEncoder
    views: Views
    guide: Path | None = None  # folder that it was opened from as guides are: texts may lie in the same space


def open_published(place: Path, size: int | None = None) -> Published:
    """The encoder of an export or a published model at `place`, a folder or the file in it; float32, on the CPU.

    No code of the folder is run, nothing is fetched. `size` of the images in pixels; what the files tell if left
    out. ValueError for a folder of no known kind and for weights that do not fit, FileNotFoundError without files.
    """
    folder = place if place.is_dir() else place.parent
    config = _told(folder, CONFIG)
    _require_served(folder, config)
    if "architecture" in config:
        return _open_timm(folder, config, size)
    if "channels" in config and "model_type" not in config:
        return _open_internimage(place, config, size)
    guide = open_guide(folder)
    views = Views(size=size or guide.patch * guide.grid, mean=tuple(guide.mean), std=tuple(guide.std))
    return Published(PublishedEncoder(guide.tower, _of_tower, views.size), views, folder)


def _require_served(folder: Path, config: Mapping[str, Any]) -> None:
    """ValueError for our exports that only other programs read."""
    name = _told(folder, KEYS).get("format")
    if config.get("model_type") == "internimage":
        name = "huggingface"
    elif name in (None, *SERVED, "huggingface"):
        return
    raise ValueError(
        f"{folder} is an export --to {name}, which is not evaluated here: name the run itself, or export it --to one "
        f"of {', '.join(SERVED)} that holds it"
    )


def is_published(place: Path) -> bool:
    """Does it look like an export or a published model?"""
    folder = place if place.is_dir() else place.parent
    return (folder / CONFIG).is_file() or (folder / "open_clip_config.json").is_file()


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
        with _noting_missing() as missing:
            trunk = timm.create_model(
                f"local-dir:{folder}", pretrained=True, pretrained_cfg_overlay=given, **options
            )
        trunk.reset_classifier(0)
    except (RuntimeError, TypeError, FileNotFoundError, AttributeError, AssertionError) as error:
        raise ValueError(f"timm does not open {folder}: {error}; export or save it again") from error
    own = trunk.state_dict().keys()
    if lacking := [name for name in missing.get(trunk, own) if name in own]:
        raise ValueError(
            f"{folder} lacks {len(lacking)} weights of {type(trunk).__name__}, such as {lacking[0]}, for which timm "
            "would leave random numbers: save the whole model again"
        )
    return Published(PublishedEncoder(trunk.eval(), _of_timm, views.size), views)


@contextmanager
def _noting_missing() -> Iterator[dict[nn.Module, list[str]]]:
    """Within it the weights that each model does not find in what it loads.

    Timm is not strict with a file of other labels, and with some of its models never.
    """
    load, missing = nn.Module.load_state_dict, {}

    def noting(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        found = load(module, *arguments, **options)
        missing[module] = found.missing_keys
        return found

    nn.Module.load_state_dict = noting
    try:
        yield missing
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


class _InternImageTrunk(nn.Module):
    def __init__(self, dcnv3: InternImage, heads: StrideTokens | None) -> None:
        super().__init__()
        self.dcnv3, self.heads = dcnv3, heads


def _of_internimage(trunk: nn.Module, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n d"]:
    maps = trunk.dcnv3(images)
    return prepend_mean((maps[-1] if trunk.heads is None else trunk.heads(maps)).flatten(1, 2))


def _open_internimage(place: Path, fields: Mapping[str, Any], size: int | None) -> Published:
    """An `internimage` export: the tokens of its token head where it has one, else those of the last stage."""
    file = place if place.is_file() else place / PLAIN_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: name a folder of `python -m pretrain.export --to internimage`"
        )
    state = finite_tensors(file if place.is_file() else own_file(place, PLAIN_FILE))
    require_numbers(fields, file.parent / CONFIG)
    try:
        config = layouts.config_from_published(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file.parent / CONFIG} describes no InternImage ({error}): export it again"
        ) from error
    layout = layouts.detect_layout(state)
    with torch.device("meta"), explained_by(state, file):
        model, _ = _internimage(config, state)
    tensors, report = layouts.read(state, model, layout)
    if report.missing or report.reshaped:  # what follows the tokens is not read
        raise ValueError(
            f"{file} does not fit its {CONFIG}: {len(report.missing)} tensors are missing and {len(report.reshaped)} "
            f"have another shape, first {(*report.missing, *report.reshaped)[0]!r}: export it again"
        )
    model, trunk = _internimage(config, state)
    model.load_state_dict(tensors, strict=True)
    pixels = read_preprocessor(file.parent)  # exports of before have none
    if pixels:
        require_statistics(pixels.mean, pixels.std, file.parent / PREPROCESSOR)
    views = replace(pixels or Views(), size=size or (pixels.size if pixels else _proven_size(file.parent)))
    return Published(PublishedEncoder(trunk, _of_internimage, views.size), views)


def _internimage(
    config: InternImageConfig, state: Mapping[str, Tensor]
) -> tuple[nn.Module, _InternImageTrunk]:
    """What is read of a file, under the names of its layout, and the same modules as they compute."""
    model, head = nn.Module(), "dcnv3_head_x3.weight"
    dcnv3 = InternImage(config)
    model.patch_embed, model.levels = dcnv3.patch_embed, dcnv3.levels
    heads = StrideTokens(config, state[head].shape[0]) if head in state else None
    if heads is not None:
        model.dcnv3_head_x4, model.dcnv3_head_x3 = heads.dcnv3_head_x4, heads.dcnv3_head_x3
    return model, _InternImageTrunk(dcnv3, heads)


def finite_tensors(place: Path) -> dict[str, Tensor]:
    """The tensors by name of a file, or of the one in a folder, also under "model"; ValueError for anything else."""
    content = open_weights(place).tensors
    content = content.get("model", content)
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        raise ValueError(f"{place} holds no tensors by name: export it again, or save model.state_dict()")
    for name, value in content.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{place}: {name} holds other than finite numbers: take other weights")
    return dict(content)


def _proven_size(folder: Path) -> int:
    """The smallest size at which the export was proven: that of the run's views."""
    proof = _told(folder, KEYS).get("proof", [])
    return min((agreement["size"] for agreement in proof if "size" in agreement), default=DEFAULT_SIZE)


def _told(folder: Path, name: str) -> dict[str, Any]:
    """Of a JSON file in a folder; empty without it."""
    return read_json(own_file(folder, name)) if (folder / name).is_file() else {}
