"""How often is an image's own caption, and a caption's own image, among the best few?

Recall at k as on Flickr30k and COCO (arXiv 1411.2539; CLIP, arXiv 2103.00020, table 13): an image is found with any
of its captions, a caption with its image. Equal captions are the same answer: two pictures of "a red fish" count for
each other. More images than compete are parted into up to five galleries, and every recall is the mean over all of
their queries, as on COCO's five folds of 1,000 images (VSE++, arXiv 1707.05612, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretrain.collectives import all_rows
from pretrain.evaluate.divided import even_share
from pretrain.evaluate.rows import MOST_GALLERIES

TOPS = (1, 5, 10)
QUERIES_AT_ONCE = 1024  # bounds the memory to so many rows of similarities


@dataclass(frozen=True)
class Matches:
    """Which candidates answer which queries, some queries at once; a query and a candidate match by a common text."""

    queries: Int[Tensor, " q"]  # by (query, text) pair
    query_texts: Int[Tensor, " q"]
    candidates: Int[Tensor, " c"]  # by (candidate, text) pair
    candidate_texts: Int[Tensor, " c"]
    num_queries: int
    num_candidates: int
    num_texts: int

    @property
    def turned(self) -> Matches:
        """Candidates as queries."""
        own, others = (self.queries, self.query_texts), (self.candidates, self.candidate_texts)
        return Matches(*others, *own, self.num_candidates, self.num_queries, self.num_texts)

    def rows(self, start: int, stop: int) -> Bool[Tensor, "b m"]:
        """Does candidate j answer query start + i?"""
        is_own = (self.queries >= start) & (self.queries < stop)
        texts, place = self.query_texts[is_own].unique(return_inverse=True)
        lookup = torch.full((self.num_texts,), -1)
        lookup[texts] = torch.arange(len(texts))
        says = torch.zeros(len(texts), self.num_candidates, dtype=torch.bool)
        there = lookup[self.candidate_texts]
        says[there[there >= 0], self.candidates[there >= 0]] = True
        found = torch.zeros(stop - start, self.num_candidates, dtype=torch.bool)
        # A query with several texts is answered by what says any of them; most have one, and one turn.
        rows = self.queries[is_own] - start
        while len(rows):
            first = torch.ones(len(rows), dtype=torch.bool)
            first[1:] = rows[1:] != rows[:-1]
            found[rows[first]] |= says[place[first]]
            rows, place = rows[~first], place[~first]
        return found

    def counts(self) -> Int[Tensor, " n"]:
        """Number of candidates that answer each query."""
        parts = [self.rows(a, b).sum(dim=1) for a, b in _chunks(self.num_queries)]
        return torch.cat(parts)


def num_judged(num_images: int, most: int) -> int:
    """Images of all galleries: whole ones of `most`, or a smaller one of all."""
    return min(max(num_images // most, 1), MOST_GALLERIES) * min(most, num_images)


def galleries(owned: Sequence[Sequence[str]], most: int) -> list[tuple[slice, slice]]:
    """The images that compete with each other, and their captions; `owned` are those of all `num_judged` images."""
    size, ends = min(most, len(owned)), [0, *accumulate(map(len, owned))]
    starts = range(0, len(owned), size)
    return [(slice(start, start + size), slice(ends[start], ends[start + size])) for start in starts]


def matches(owned: Sequence[Sequence[str]]) -> Matches:
    """Images as queries, with the captions that each owns; all captions, image by image, as candidates."""
    number = {text: i for i, text in enumerate(dict.fromkeys(text for texts in owned for text in texts))}
    texts = [number[text] for captions in owned for text in captions]
    pairs = [(row, number[text]) for row, captions in enumerate(owned) for text in dict.fromkeys(captions)]
    images, said = torch.tensor(pairs).T
    return Matches(
        images, said, torch.arange(len(texts)), torch.tensor(texts), len(owned), len(texts), len(number)
    )


def ranks(
    queries: Float[Tensor, "n e"], candidates: Float[Tensor, "m e"], matches: Matches
) -> Int[Tensor, " n"]:
    """Candidates that stand before the best match of each query: 0 where a match is the best of all.

    A collective call: all ranks give all queries and candidates, and each looks for some of the queries.
    """
    own = even_share(len(queries))
    found = [torch.empty(0, dtype=torch.long)]
    for start in range(own.start, own.stop, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, own.stop)
        right = matches.rows(start, stop)
        similarity = queries[start:stop] @ candidates.T
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        # Ties count against the match, and so does what is no number.
        found.append((~(similarity < best) & ~right).sum(dim=1))
    return all_rows(torch.cat(found))


def chance(is_match: Matches, top: int) -> float:
    """Recall of m candidates in random order: mean of 1 - C(m - r, top) / C(m, top), a query having r matches."""
    num_candidates = is_match.num_candidates
    top = min(top, num_candidates)
    kinds, numbers = (found.tolist() for found in is_match.counts().unique(return_counts=True))
    missed = [comb(num_candidates - r, top) / comb(num_candidates, top) for r in kinds]
    return 1 - sum(share * n for share, n in zip(missed, numbers, strict=True)) / is_match.num_queries


def _chunks(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERIES_AT_ONCE, count)) for start in range(0, count, QUERIES_AT_ONCE)]
