"""Which category do an image's nearest training images vote for?

Source: DINO (arXiv 2104.14294), section 4.1: neighbours by cosine, votes exp(similarity / 0.07), which it has from
instance discrimination; it reports the best k of 10, 20, 100 and 200, 20 as a rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pretrain.collectives import all_rows, rows_of
from pretrain.evaluate.divided import division

TEMPERATURE = 0.07  # of the votes; instance discrimination (arXiv 1805.01978), section 3.4
CHUNK, MOST_ROWS = (
    1024,
    2**20,
)  # queries and training images compared at once: bounds the memory to their product

Found = tuple[Tensor, Tensor]  # [m, some] each: similarities, largest first, and whose they are


def nearest(
    train: Float[Tensor, "n d"], queries: Float[Tensor, "m d"], k: int, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Cosine similarities and indices of the k nearest training features, nearest first; found on `device`.

    Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= len(train):
        raise _impossible(k, len(train))
    best = _none_of(queries)
    for first, part in zip(range(0, len(train), MOST_ROWS), train.split(MOST_ROWS), strict=True):
        directions = F.normalize(part.to(device), dim=1)
        found = [
            (F.normalize(chunk.to(device), dim=1) @ directions.T).topk(min(k, len(part)), dim=1)
            for chunk in queries.split(CHUNK)
        ]
        values = torch.cat([top.values.cpu() for top in found])
        best = _best(best, (values, first + torch.cat([top.indices.cpu() for top in found])), k)
    return best


def vote(
    similarities: Float[Tensor, "m k"], labels: Int[Tensor, "m k"], num_categories: int
) -> Int[Tensor, " m"]:
    """Category with the largest sum of exp(similarity / TEMPERATURE) over the neighbours; the lower one on a tie."""
    weights = (similarities / TEMPERATURE).softmax(dim=1)
    votes = torch.zeros(len(labels), num_categories, dtype=weights.dtype)
    return votes.scatter_add_(1, labels, weights).argmax(dim=1)


def votes(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m d"],
    ks: Sequence[int],
    num_categories: int,
) -> dict[int, Int[Tensor, " m"]]:
    """Predicted categories by k, of one search; a k above the number of training images is left out."""
    possible = [k for k in dict.fromkeys(ks) if k <= len(train)]
    if not possible:
        return {}
    similarities, indices = nearest(train, queries, max(possible))
    return _votes_of(similarities, train_labels[indices], possible, num_categories)


def nearest_of_all(
    train: Float[Tensor, "n d"], queries: Float[Tensor, "m d"], k: int, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """As `nearest`, of this rank's queries among the training features of all ranks, of which it gives its share.

    A collective call: the shares go round, so that no rank holds more than its own and one other.
    """
    divided = division(len(train))
    if not 1 <= k <= divided.total:
        raise _impossible(k, divided.total)
    best, first = _none_of(queries), 0
    for source, count in enumerate(divided.counts):
        if count:
            values, numbers = nearest(rows_of(train, source, count), queries, min(k, count), device)
            best = _best(best, (values, first + numbers), k)
        first += count
    return best


def _none_of(queries: Float[Tensor, "m d"]) -> Found:
    return torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)


def _best(some: Found, others: Found, k: int) -> Found:
    """The k largest of both; of equal ones those of `some`."""
    values, numbers = (torch.cat(pair, dim=1) for pair in zip(some, others, strict=True))
    values, places = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], numbers.gather(1, places[:, :k])


def votes_of_all(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m d"],
    ks: Sequence[int],
    num_categories: int,
    device: torch.device | str = "cpu",
) -> dict[int, Int[Tensor, " _"]]:
    """As `votes`, where each rank gives its share of the training images and of the queries, and gets what is said of
    all queries. A collective call.
    """
    labels = all_rows(train_labels)
    possible = [k for k in dict.fromkeys(ks) if k <= len(labels)]
    if not possible:
        return {}
    similarities, indices = nearest_of_all(train, queries, max(possible), device)
    own = _votes_of(similarities, labels[indices], possible, num_categories)
    return {k: all_rows(said) for k, said in own.items()}


def _votes_of(
    similarities: Float[Tensor, "m k"], labels: Int[Tensor, "m k"], ks: Sequence[int], num_categories: int
) -> dict[int, Int[Tensor, " m"]]:
    return {k: vote(similarities[:, :k], labels[:, :k], num_categories) for k in ks}


def _impossible(k: int, num_images: int) -> ValueError:
    return ValueError(f"k={k} must lie in [1, {num_images}], the number of training images: give another --k")
