"""How does a file of InternImage's weights, of any layout, become an encoder that the protocols can read?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.config import Views
from pretrain.evaluate.published_encoder import CONFIG, Published, PublishedEncoder, finite_tensors
from pretrain.initial.bounds import explained_by, require_numbers
from pretrain.models import internimage_layouts as layouts
from pretrain.models.internimage import InternImage, StrideTokens
from pretrain.models.internimage_config import InternImageConfig
from pretrain.models.pooling import prepend_mean
from pretrain.models.undrawn import undrawn

HEAD = "dcnv3_head_x3.weight"  # in the plain layout: what makes tokens of the last two stages
LAST_STAGE = (
    "its tokens are those of the last stage, since the file has no head that makes pre-training's of them"
)


class _InternImageTrunk(nn.Module):
    def __init__(self, dcnv3: InternImage, heads: StrideTokens | None) -> None:
        super().__init__()
        self.dcnv3, self.heads = dcnv3, heads


def _of_internimage(trunk: nn.Module, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n d"]:
    maps = trunk.dcnv3(images)
    return prepend_mean((maps[-1] if trunk.heads is None else trunk.heads(maps)).flatten(1, 2))


def open_internimage(file: Path, fields: Mapping[str, Any], views: Views) -> Published:
    """InternImage of any layout: the tokens of its token head where the file has one, else those of the last stage.

    `fields` are the published constructor's. ValueError for weights that do not fit them.
    """
    state = finite_tensors(file)
    require_numbers(fields, file.parent / CONFIG)
    try:
        config = layouts.config_from_published(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file.parent / CONFIG} describes no InternImage ({error}): export it again"
        ) from error
    layout = layouts.detect_layout(state)
    head = layouts.to_layout_key(HEAD, layout)
    token_width = len(state[head]) if head in state else None
    with torch.device("meta"), explained_by(state, file):
        model, _ = _internimage(config, token_width)
    tensors, report = layouts.read(state, model, layout)
    if report.missing or report.reshaped:  # what follows the tokens is not read
        raise ValueError(
            f"{file} does not fit its {CONFIG}: {len(report.missing)} tensors are missing and {len(report.reshaped)} "
            f"have another shape, first {(*report.missing, *report.reshaped)[0]!r}: export it again"
        )
    with undrawn():
        model, trunk = _internimage(config, token_width)
    model.load_state_dict(tensors, strict=True)
    encoder = PublishedEncoder(trunk, _of_internimage, views.size)
    return Published(encoder, views, note=LAST_STAGE if trunk.heads is None else "")


def _internimage(config: InternImageConfig, token_width: int | None) -> tuple[nn.Module, _InternImageTrunk]:
    """What is read of a file, under the names of its layout, and the same modules as they compute."""
    model, dcnv3 = nn.Module(), InternImage(config)
    model.patch_embed, model.levels = dcnv3.patch_embed, dcnv3.levels
    heads = None if token_width is None else StrideTokens(config, token_width)
    if heads is not None:
        model.dcnv3_head_x4, model.dcnv3_head_x3 = heads.dcnv3_head_x4, heads.dcnv3_head_x3
    return model, _InternImageTrunk(dcnv3, heads)
