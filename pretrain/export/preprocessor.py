"""How does transformers make the pixels that pre-training's evaluation sees? preprocessor_config.json."""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.config import Views

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
    (folder / "preprocessor_config.json").write_text(json.dumps(fields, indent=1) + "\n")
