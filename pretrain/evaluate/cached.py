"""Which images keep all their tokens, so that a probe can be trained on them in bounded memory?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_BYTES = 2**30  # of one data set's tokens
BYTES = 2  # of a number in half precision


@dataclass(frozen=True)
class CachedTokens:
    """All tokens of some images, on the CPU in half precision."""

    tokens: Float[Tensor, "n l d"]
    index: Int[Tensor, " n"]  # of the sample in the data set


class TokenCache:
    """Gathers CachedTokens of images spread evenly over a data set, as many as MOST_BYTES hold."""

    def __init__(self, num_images: int, numbers_an_image: int) -> None:
        count = min(num_images, max(MOST_BYTES // (BYTES * numbers_an_image), 1))
        self._wanted = {i * num_images // count for i in range(count)}
        self._tokens: list[Tensor] = []
        self._index: list[int] = []

    def add(self, tokens: Float[Tensor, "b l d"], index: Sequence[int]) -> None:
        rows = [row for row, number in enumerate(index) if number in self._wanted]
        if rows:
            self._tokens.append(tokens[rows].half().cpu())
            self._index += [index[row] for row in rows]

    def collected(self) -> CachedTokens | None:
        """None when nothing was added."""
        if not self._tokens:
            return None
        return CachedTokens(torch.cat(self._tokens), torch.tensor(self._index))
