"""How does a Hugging Face folder become a frozen encoder? CLIP's vision branch, or a plain vision encoder."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from pretrain.initial.blocks import require_no_more_blocks
from pretrain.initial.bounds import MOST_PIXELS
from pretrain.initial.files import own_file, read_json
from pretrain.initial.one_image import TooLargeImage, try_image
from pretrain.models.guides.guide import Opened

CONFIG = "config.json"
INDEX = ".index.json"  # ending of a file that tells in which files the weights lie
WEIGHTS = (  # of transformers: the first that is there is read
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
MOST_EXTRA = 16  # tokens beside the patches: class, distillation, registers
UNUSED = ("pooler.", "embeddings.mask_token")  # parts of an encoder that may lack weights


def is_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and "model_type" in _read(folder / CONFIG) and bool(_chosen(folder))


def model_type_of(folder: Path) -> str:
    """What transformers calls the kind of model, "clip"."""
    return str(_read(folder / CONFIG)["model_type"])


def open_folder(folder: Path) -> Opened:
    """The encoder in the folder, read without network and without running code of it.

    ValueError for a model that is no vision encoder with a square grid, for missing or unreadable weights, and
    where no file tells mean and standard deviation of the pixels.
    """
    model_type = model_type_of(folder)
    tower, config = OPENERS.get(model_type, _open_plain)(folder)
    tower.requires_grad_(False).eval()
    patch, size = _square(folder, config, "patch_size"), _square(folder, config, "image_size")
    width = _try_grid(folder, tower, patch, size // patch + 1)  # another one than it was trained on
    read = (_chosen(folder), *weights_in(folder))
    present = [name for name in (CONFIG, *PROCESSORS) if (folder / name).is_file()]
    mean, std = _pixels(folder, model_type)
    return Opened(tower, width, patch, size // patch, mean, std, folder, tuple(sorted({*present, *read})))


class ClipTower(nn.Module):
    """All last tokens of CLIP's vision branch in the space that images and texts share (MVP, section 3)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vision, self.projection = model.vision_model, model.visual_projection

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n l d"]:
        tokens = self.vision(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
        return self.projection(self.vision.post_layernorm(tokens))


class PlainTower(nn.Module):
    """Class token and patch tokens of a vision encoder after its final norm; other extra tokens are left out."""

    def __init__(self, model: nn.Module, patch: int) -> None:
        super().__init__()
        self.model, self.patch = model, patch
        takes = inspect.signature(model.forward).parameters
        self.options = {name: True for name in ("interpolate_pos_encoding",) if name in takes}

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n l d"]:
        tokens = self.model(pixel_values=images, **self.options).last_hidden_state
        num_extra = tokens.shape[1] - (images.shape[-1] // self.patch) ** 2
        if tokens.ndim != 3 or not 0 <= num_extra <= MOST_EXTRA:
            raise ValueError(f"its output has shape {tuple(tokens.shape)}, no token for each patch")
        patches = tokens[:, num_extra:]
        summary = tokens[:, :1] if num_extra else patches.mean(dim=1, keepdim=True)
        return torch.cat([summary, patches], dim=1)


def _open_clip(folder: Path) -> tuple[nn.Module, Any]:
    from transformers import CLIPModel  # takes seconds, and other guides do not need it

    model = load(folder, CLIPModel)
    return ClipTower(model), model.config.vision_config


def _open_clip_vision(folder: Path) -> tuple[nn.Module, Any]:
    from transformers import CLIPVisionModelWithProjection

    model = load(folder, CLIPVisionModelWithProjection)
    return ClipTower(model), model.config


def _open_plain(folder: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModel

    model = load(folder, AutoModel)
    return PlainTower(model, _square(folder, model.config, "patch_size")), model.config


OPENERS: dict[str, Callable[[Path], tuple[nn.Module, Any]]] = {  # by model_type; others are plain encoders
    "clip": _open_clip,
    "clip_vision_model": _open_clip_vision,
}


def load(folder: Path, family: Any) -> nn.Module:
    """The model in float32; ValueError for weights that are missing or would run code."""
    try:
        with _quiet():
            model, told = family.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                use_safetensors=".safetensors" in _chosen(folder),
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{folder} cannot be read as a Hugging Face model ({error}): save it again by `save_pretrained`, which "
            "writes safetensors"
        ) from error
    if missing := sorted(name for name in told["missing_keys"] if not name.startswith(UNUSED)):
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}: save the whole "
            "model again; of a CLIP with its projection (CLIPModel or CLIPVisionModelWithProjection)"
        )
    require_no_more_blocks(folder, model.state_dict(), told["unexpected_keys"])
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides transformers' table of missing weights: those that are used are an error here, others do not matter."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _try_grid(folder: Path, tower: nn.Module, patch: int, grid: int) -> int:
    """Width of the tower's features; ValueError unless one black image gives grid x grid tokens and a summary."""
    try:
        shape = tuple(try_image(tower, grid * patch, folder).shape)
    except TooLargeImage:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(_no_grid(folder, f"it gives no {grid} x {grid} tokens ({error})")) from error
    assert shape[1] == 1 + grid**2, f"{type(tower).__name__} gives {shape}"
    return shape[2]


def _no_grid(folder: Path, found: str) -> str:
    return (
        f"{folder} is no encoder with a square grid of tokens, since {found}: name a CLIP, or a vision encoder such "
        "as ViT, DeiT, BEiT or DINOv2"
    )


def _square(folder: Path, config: Any, name: str) -> int:
    """A size of the model's config, in pixels; ValueError unless there is one for both sides."""
    value = getattr(config, name, None)
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int) or not 0 < side <= MOST_PIXELS:
        raise ValueError(
            _no_grid(
                folder, f"its {CONFIG} has {name}={value}, not one number of pixels in [1, {MOST_PIXELS}]"
            )
        )
    return side


def _pixels(folder: Path, model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by the processor's file, for CLIP otherwise those it was published with."""
    for name in PROCESSORS:
        told = _read(folder / name) if (folder / name).is_file() else {}
        told = told.get("image_processor", told)  # where a processor of images and texts was saved
        if told.get("do_normalize") is False:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if "image_mean" in told and "image_std" in told:
            return tuple(told["image_mean"]), tuple(told["image_std"])
    if model_type in OPENERS:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        return tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)
    raise ValueError(
        f"{folder} does not tell the mean and standard deviation of its pixels: save its image processor there, "
        f"`AutoImageProcessor.from_pretrained(...).save_pretrained({str(folder)!r})`"
    )


def weights_in(folder: Path) -> list[str]:
    """Names of the files whose tensors transformers loads; empty where there are none."""
    name = _chosen(folder)
    if not name.endswith(INDEX):
        return [name] if name else []
    places = _read(folder / name).get("weight_map") if (folder / name).is_file() else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{folder / name} has no weight_map of file names: copy the folder again")
    return sorted(set(places.values()))


def _chosen(folder: Path) -> str:
    """The file of weights that transformers opens, or their index; empty where there is none."""
    told = _read(folder / CONFIG).get("transformers_weights")
    return str(told or next((name for name in WEIGHTS if (folder / name).is_file()), ""))


def _read(path: Path) -> dict[str, Any]:
    return read_json(own_file(path.parent, path.name))
