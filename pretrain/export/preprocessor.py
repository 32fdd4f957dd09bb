"""How does transformers make the pixels that pre-training's evaluation sees? preprocessor_config.json."""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.config import Views

PREPROCESSOR = "preprocessor_config.json"
BICUBIC = 3  # as Pillow counts


def write_preprocessor(views: Views, folder: Path) -> None:
    """Short side resized bicubically, middle square, pixel statistics of the run.

    CLIPImageProcessor does these steps in this order, in transformers 4 and 5; ViTImageProcessor would squash.
    """
    fields = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": views.size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": views.size, "width": views.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(views.mean),
        "image_std": list(views.std),
    }
    (folder / PREPROCESSOR).write_text(json.dumps(fields, indent=1) + "\n")


def read_preprocessor(folder: Path) -> Views | None:
    """Size and pixel statistics that `write_preprocessor` wrote; None without the file, ValueError for another's."""
    path = folder / PREPROCESSOR
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text())
        mean, std = (tuple(map(float, fields[name])) for name in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean {mean} and std {std} are no three numbers each")
        return Views(size=int(fields["crop_size"]["height"]), mean=mean, std=std)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not tell crop_size, image_mean and image_std ({error!r}): export again"
        ) from error
