"""How does a file of a ViT's weights, named as any toolkit does, become an encoder that the protocols can read?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.config import Backbone, Views
from pretrain.evaluate.published_encoder import (
    CONFIG,
    EncoderAlone,
    Published,
    PublishedEncoder,
    finite_tensors,
)
from pretrain.initial.bounds import explained_by, require_numbers
from pretrain.initial.fit import fill, fit
from pretrain.initial.layouts import detect
from pretrain.models.timm_encoders import ViTEncoder, ViTSize
from pretrain.models.undrawn import undrawn

BACKBONE = Backbone("vit", "vit_b16", drop_path=0.0)  # of these settings none is of a file


def open_vit(file: Path, fields: Mapping[str, Any], views: Views) -> Published:
    """`fields` are width, depth, heads, patch and image_size; ValueError for weights that do not fit them."""
    state = finite_tensors(file)
    require_numbers(fields, file.parent / CONFIG)
    try:
        size = ViTSize(*(fields[name] for name in ("width", "depth", "heads", "patch")))
        with torch.device("meta"), explained_by(state, file):
            ViTEncoder(size, BACKBONE, fields["image_size"])
        with undrawn():
            encoder = ViTEncoder(size, BACKBONE, fields["image_size"])
        alone = EncoderAlone(encoder)
        fill(alone, fit(state, detect(state, str(file)), alone, "vit", False, str(file)))
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"{file} does not fit its {CONFIG}, export it again: {error}") from error
    return Published(PublishedEncoder(encoder.vit, _tokens, views.size), views)


def _tokens(vit: nn.Module, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n d"]:
    """Class token and patch tokens after the last norm."""
    return vit(images)
