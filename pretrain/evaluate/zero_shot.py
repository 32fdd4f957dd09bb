"""Which class name, and which caption, fits an image best in the space of the captions?"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_prep.schema import fill_prompt

# The first two are CLIP's simplest (arXiv 2103.00020, section 3.1.4);
# the others are how people, and the captions of the embedded scenes, open a description.
PROMPTS = (
    "a photo of {}.",
    "{}.",
    "a picture of {}",
    "an image of {}",
    "a view of {}",
    "a snapshot of {}",
    "here is {}",
    "there is {}",
    "{}",
)
MAX_CANDIDATES = 1000  # images and captions that compete in retrieval
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


def class_vectors(categories: tuple[str, ...], encode: Encode, embed: EmbedTexts) -> Float[Tensor, "k e"]:
    """One unit vector a category: the normalised mean of the unit vectors of its PROMPTS."""
    captions = [fill_prompt(prompt, category) for category in categories for prompt in PROMPTS]
    vectors = embed_captions(captions, encode, embed).unflatten(0, (len(categories), len(PROMPTS)))
    return ensemble(vectors)


def ensemble(vectors: Float[Tensor, "k p e"]) -> Float[Tensor, "k e"]:
    """Normalised mean of p unit vectors a category."""
    return F.normalize(vectors.mean(dim=1), dim=-1)


def classify(images: Float[Tensor, "n e"], classes: Float[Tensor, "k e"]) -> Int[Tensor, " n"]:
    """Category whose vector has the largest product with the image's; all are unit vectors."""
    return (images @ classes.T).argmax(dim=1)


def retrieve(queries: Float[Tensor, "n e"], candidates: Float[Tensor, "n e"], captions: list[str]) -> int:
    """Number of queries whose best candidate is their own; row i of both belongs to captions[i].

    Candidates with the same caption are the same answer: two pictures of "a red fish" count for each other.
    """
    best = (queries @ candidates.T).argmax(dim=1)
    return sum(captions[row] == captions[column] for row, column in enumerate(best.tolist()))
