"""Which sample stands at a position of the run's global order?"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CYCLE = 1000  # positions after which the choice of sources repeats; any so many hold exact shares
SHUFFLED = 8  # neighbouring positions whose sources are shuffled, so that pairs of every kind meet
WINDOW = 32  # shards whose samples are shuffled together: locality of reading against mixing


@dataclass(frozen=True)
class Pick:
    """One sample of one source, and the pass over that source in which it is drawn."""

    source: int
    epoch: int
    shard: int
    index: int  # inside the shard


class Order:
    """(seed, position) -> Pick, for weighted sources; it keeps nothing but caches.

    Each source delivers each of its samples exactly once an epoch. Shares of the sources follow the weights
    to one sample in any 1,000 positions. Any process computes the same order.
    Raises ValueError when a source's share is below 1 in 1,000.
    """

    def __init__(self, seed: int, weights: Sequence[float], shard_sizes: Sequence[Sequence[int]]) -> None:
        self._slots = source_cycle(seed, weights)
        quotas = np.bincount(self._slots, minlength=len(weights))
        self._quotas = quotas.tolist()
        earlier = np.zeros(CYCLE, dtype=np.int64)  # slots of the same source before this one
        for source in range(len(weights)):
            chosen = self._slots == source
            earlier[chosen] = np.arange(quotas[source])
        self._earlier = earlier
        self._sources = [SourceOrder(seed, source, sizes) for source, sizes in enumerate(shard_sizes)]

    def draw(self, position: int) -> tuple[int, int]:
        """The source at `position` and how many samples of that source come before it."""
        cycle, slot = divmod(position, CYCLE)
        source = int(self._slots[slot])
        return source, cycle * self._quotas[source] + int(self._earlier[slot])

    def pick(self, source: int, draw: int) -> Pick:
        """The sample that is the `draw`-th (from 0) of `source`."""
        return self._sources[source].pick(draw)

    def __getitem__(self, position: int) -> Pick:
        return self.pick(*self.draw(position))


class SourceOrder:
    """Permutes one source anew each epoch: its shards, then the samples of every window of shards."""

    def __init__(self, seed: int, source: int, shard_sizes: Sequence[int]) -> None:
        self._key = (seed, source)
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self._sizes.sum())
        # A step reads one window, or two at a border; workers a few steps apart read the same.
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)
        self._window = lru_cache(maxsize=4)(self._lay_out_window)

    def pick(self, draw: int) -> Pick:
        epoch, place = divmod(draw, self.num_samples)
        _, window_starts = self._epoch(epoch)
        window = bisect_right(window_starts, place) - 1
        shards, indices = self._window(epoch, window)
        place -= window_starts[window]
        return Pick(self._key[1], epoch, int(shards[place]), int(indices[place]))

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Permuted shard numbers, and the place in the epoch where each window of them starts."""
        shards = permutation(len(self._sizes), *self._key, epoch)
        starts = np.concatenate([[0], np.cumsum(self._sizes[shards])[:-1]])
        return shards, starts[::WINDOW].tolist()

    def _lay_out_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and index inside the shard of every sample of one window, in order."""
        shards = self._epoch(epoch)[0][window * WINDOW : (window + 1) * WINDOW]
        sizes = self._sizes[shards]
        order = permutation(int(sizes.sum()), *self._key, epoch, window)
        starts = np.cumsum(sizes) - sizes
        which = np.repeat(np.arange(len(shards), dtype=np.int32), sizes)[order]
        return shards[which].astype(np.int32), (order - starts[which]).astype(np.int32)


def source_cycle(seed: int, weights: Sequence[float]) -> np.ndarray:
    """The source of each of CYCLE positions: exact shares, evenly spread, shuffled within SHUFFLED positions.

    Shuffling breaks the regular beat of an even spread: of two equal sources one would always be the first
    image of a pair. Raises ValueError when a source gets no position.
    """
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    if share.min() * CYCLE < 1:
        raise ValueError(
            f"data weights {list(weights)} give a source {share.min():.2g} of the samples; the smallest "
            f"share is 1 in {CYCLE}: raise that weight or leave the source out"
        )
    quotas = np.floor(share * CYCLE).astype(np.int64)
    for source in np.argsort(quotas - share * CYCLE, kind="stable")[: CYCLE - quotas.sum()]:
        quotas[source] += 1  # largest remainder
    # Slot k of a source with q slots is due at (k + 1/2) / q of the cycle: sorted due times spread it evenly.
    due = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
    slots = np.repeat(np.arange(len(quotas)), quotas)[np.argsort(due, kind="stable")]
    for block, start in enumerate(range(0, CYCLE, SHUFFLED)):
        window = slots[start : start + SHUFFLED]
        slots[start : start + SHUFFLED] = window[permutation(len(window), seed, block)]
    return slots


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) that depends on `key` alone, in every version of numpy.

    RandomState is numpy's frozen generator: its streams never change (NEP 19), so a run resumes exactly.
    """
    return np.random.RandomState([number % 2**32 for number in key]).permutation(size)
