"""What do the towers compute, as pre-training calls them? Once for an image size, whatever the number of formats."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.export.agreement import random_images
from pretrain.export.trained import Trained


@torch.inference_mode()
def own_features(trained: Trained, size: int) -> dict[str, Tensor]:
    """Every output for `random_images(size)`, by name, from one pass through the encoder.

    `summary` [n, d] and `tokens` [n, l, d]; of an InternImage `stage 1`, ... [n, h, w, c]; as far as the run trained
    them `embedding` [n, e], `logits` [n, k] and `texts` [n, e] of texts of ones. Remembered for the next format.
    """
    if size not in trained.features:
        trained.features[size] = _compute(trained, random_images(size))
    return trained.features[size]


def _compute(trained: Trained, images: Tensor) -> dict[str, Tensor]:
    towers, maps = trained.towers, []
    backbone = getattr(towers.encoder, "dcnv3", None)  # whose maps the encoder makes its tokens of
    watching = backbone and backbone.register_forward_hook(lambda _module, _inputs, found: maps.extend(found))
    try:
        tokens = towers.encoder(images, summary=True)
    finally:
        if watching:
            watching.remove()
    outputs = {f"stage {index + 1}": stage_map for index, stage_map in enumerate(maps)}
    outputs |= {"summary": tokens[:, 0], "tokens": tokens[:, 1:]}
    if _is_read(towers, "pool"):
        outputs["embedding"] = towers.embed_tokens(outputs["tokens"])
    if _is_read(towers, "category"):
        outputs["logits"] = towers.category(outputs["embedding"])
    if _is_read(towers, "text"):
        texts = texts_of_ones(trained, len(images))
        outputs["texts"] = towers.embed_texts(texts, texts.bool())
    return outputs


def texts_of_ones(trained: Trained, number: int) -> Tensor:
    """[number, length]: as good as any text, to compare towers with."""
    return torch.ones(number, trained.run.text.length, dtype=torch.int64)


def _is_read(towers: torch.nn.Module, name: str) -> bool:
    """Whether the run trained that part, and its weights were read."""
    part = getattr(towers, name, None)
    return part is not None and not any(tensor.is_meta for tensor in part.parameters())
