"""Which class name fits an image best in the space of the captions?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretrain.collectives import all_rows
from pretrain.evaluate.divided import even_share
from pretrain.evaluate.templates import PROMPTS, Template

TEXTS_AT_ONCE = 256

Encode = Callable[[str], tuple[Int[Tensor, " length"], Bool[Tensor, " length"]]]
EmbedTexts = Callable[[Int[Tensor, "n length"], Bool[Tensor, "n length"]], Float[Tensor, "n e"]]


def embed_captions(captions: list[str], encode: Encode, embed: EmbedTexts) -> Float[Tensor, "n e"]:
    """Unit vectors of captions, float32 on the CPU; `encode` tokenises one, `embed` runs the text tower."""
    vectors = []
    for start in range(0, len(captions), TEXTS_AT_ONCE):
        tokens, masks = zip(*map(encode, captions[start : start + TEXTS_AT_ONCE]), strict=True)
        vectors.append(embed(torch.stack(tokens), torch.stack(masks)).cpu())
    return torch.cat(vectors)


def by_all_ranks(
    work: Callable[[Sequence[str]], Float[Tensor, "_ e"]], texts: Sequence[str], width: int
) -> Float[Tensor, "_ e"]:
    """Vectors of `width` numbers that `work` makes of texts, some of them on each rank. A collective call."""
    own = even_share(len(texts))
    vectors = work(texts[own.start : own.stop]) if own else torch.empty(0, width)
    return all_rows(vectors)


def class_vectors(
    names: Sequence[str], encode: Encode, embed: EmbedTexts, templates: Sequence[Template] = PROMPTS
) -> Float[Tensor, "k e"]:
    """One unit vector a class name: the normalised mean of the unit vectors of what the templates make of it."""
    at_once = max(
        TEXTS_AT_ONCE // len(templates), 1
    )  # names: a thousand of 80 captions each are many vectors
    vectors = []
    for start in range(0, len(names), at_once):
        some = names[start : start + at_once]
        captions = [template.fill(name) for name in some for template in templates]
        of_each = embed_captions(captions, encode, embed).unflatten(0, (len(some), len(templates)))
        vectors.append(ensemble(of_each))
    return torch.cat(vectors)


def ensemble(vectors: Float[Tensor, "k p e"]) -> Float[Tensor, "k e"]:
    """Normalised mean of p unit vectors a category."""
    return F.normalize(vectors.mean(dim=1), dim=-1)


def classify(images: Float[Tensor, "n e"], classes: Float[Tensor, "k e"]) -> Int[Tensor, " n"]:
    """Category whose vector has the largest product with the image's; all are unit vectors."""
    return (images @ classes.T).argmax(dim=1)


def count_top(
    images: Float[Tensor, "n e"], classes: Float[Tensor, "k e"], labels: Int[Tensor, " n"], top: int
) -> int:
    """Number of images whose category is among the `top` best."""
    best = (images @ classes.T).topk(min(top, len(classes)), dim=1).indices
    return int((best == labels[:, None]).sum())
