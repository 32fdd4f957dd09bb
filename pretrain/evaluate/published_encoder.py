"""What is an encoder of an exported or published model to the protocols, and which files tell of it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from pretrain.config import Views
from pretrain.initial.bounds import require_pixels, require_statistics
from pretrain.initial.files import KEYS, open_weights, own_file, read_json
from pretrain.initial.one_image import try_image

CONFIG = "config.json"
DEFAULT_SIZE = 224  # pixels, where no file tells the size of the images
ROUNDING = 1e-6  # of pixels in [0, 1]: as far as float32 may move what two files tell


class PublishedEncoder(nn.Module):
    """Tokens of another model, as our encoders give them: images [b, 3, s, s] -> [b, l, width], row by row.

    With `summary` [b, 1 + l, width]: before them the class token, else the mean of the tokens. `fixed` says why its
    weights cannot be trained, where they cannot.
    """

    def __init__(
        self, trunk: nn.Module, tokens: Callable[[nn.Module, Tensor], Tensor], size: int, fixed: str = ""
    ) -> None:
        super().__init__()
        self.fixed = fixed
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
    note: str = ""  # which features these are, where they are not those that pre-training reads


def finite_tensors(place: Path) -> dict[str, Tensor]:
    """The tensors by name of a file, or of the one in a folder, also in a container; ValueError for anything else."""
    content = open_weights(place).tensors
    content = content.get("model", content.get("state_dict", content))
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


def proven_size(folder: Path) -> int:
    """The smallest size at which the export was proven: that of the run's views."""
    proof = told_by(folder, KEYS).get("proof", [])
    return min((agreement["size"] for agreement in proof if "size" in agreement), default=DEFAULT_SIZE)


def require_same_pixels(folder: Path, views: Views) -> None:
    """ValueError where an export's keys.json tells of another mean or std than the file that images are made by."""
    told = told_by(folder, KEYS).get("views")
    if not isinstance(told, Mapping) or not told.keys() >= {"mean", "std"}:
        return  # of before, or of others
    exported = require_statistics(told["mean"], told["std"], folder / KEYS)
    for name, trained, found in zip(("mean", "std"), exported, (views.mean, views.std), strict=True):
        if any(abs(one - other) > ROUNDING for one, other in zip(trained, found, strict=True)):
            raise ValueError(
                f"{folder} tells pixels of {name} {found}, and its {KEYS} {trained}: both must be those of the "
                f"training; copy the export again, or take the views out of {KEYS} if you changed them yourself"
            )


def told_by(folder: Path, name: str) -> dict[str, Any]:
    """Of a JSON file in a folder; empty without it."""
    return read_json(own_file(folder, name)) if (folder / name).is_file() else {}
