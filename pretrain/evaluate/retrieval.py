"""How often is an image's own caption, and a caption's own image, among the best few?

Recall at k as on Flickr30k and COCO (arXiv 1411.2539; CLIP, arXiv 2103.00020, table 13): an image is found with any
of its captions, a caption with its image. Equal captions are the same answer: two pictures of "a red fish" count for
each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TOPS = (1, 5, 10)
MAX_IMAGES = 1000  # that compete, with all their captions
QUERIES_AT_ONCE = 1024


def matches(owned: Sequence[Sequence[str]]) -> Bool[Tensor, "n m"]:
    """Does caption j of all, image by image, say what image i is told to show?"""
    number = {text: i for i, text in enumerate(dict.fromkeys(text for texts in owned for text in texts))}
    texts = torch.tensor([number[text] for captions in owned for text in captions])
    says = torch.zeros(len(owned), len(number), dtype=torch.bool)
    for row, captions in enumerate(owned):
        says[row, [number[text] for text in captions]] = True
    return says[:, texts]


def ranks(
    queries: Float[Tensor, "n e"], candidates: Float[Tensor, "m e"], is_match: Bool[Tensor, "n m"]
) -> Int[Tensor, " n"]:
    """Candidates that stand before the best match of each query: 0 where a match is the best of all."""
    found = []
    for some, right in zip(queries.split(QUERIES_AT_ONCE), is_match.split(QUERIES_AT_ONCE), strict=True):
        similarity = some @ candidates.T
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        found.append(((similarity >= best) & ~right).sum(dim=1))  # ties count against the match
    return torch.cat(found)


def chance(is_match: Bool[Tensor, "n m"], top: int) -> float:
    """Recall of candidates in random order: mean of 1 - C(m - r, top) / C(m, top), a query having r matches of m."""
    count = is_match.shape[1]
    top = min(top, count)
    missed = {r: comb(count - r, top) / comb(count, top) for r in set(is_match.sum(dim=1).tolist())}
    return 1 - sum(missed[r] for r in is_match.sum(dim=1).tolist()) / len(is_match)
