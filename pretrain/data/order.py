"""Which sample stands at a position of the run's global order? NumPy alone, so that anything can ask."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pretrain.config import Mixing

CYCLE = 1000  # positions after which the choice of sources repeats; any so many hold exact shares
SHUFFLED = 8  # neighbouring positions whose sources are shuffled, so that pairs of every kind meet
ROUNDING = 1e-9  # of a share that is a whole number of positions
PAIR = 2  # neighbouring positions that share an input, where two images do


class Pick(NamedTuple):
    """One sample of one source, and the pass over that source in which it is drawn."""

    source: int
    epoch: int
    shard: int
    index: int  # inside the shard


class Order:
    """(seed, position) -> Pick, for weighted sources; it keeps nothing but caches.

    Each source delivers each of its samples exactly once an epoch. Shares of the sources are those of `shares`
    to less than one sample in any 1,000 positions; with mixing.pairs="same" the pair is the unit, and it is less than
    one pair, that is two samples. Any process computes the same order. Raises ValueError as `source_cycle`.
    """

    def __init__(
        self,
        seed: int,
        weights: Sequence[float],
        shard_sizes: Sequence[Sequence[int]],
        mixing: Mixing = Mixing(),  # noqa: B008  frozen
    ) -> None:
        self.shares = shares(weights, [sum(sizes) for sizes in shard_sizes], mixing)
        self.slots = source_cycle(seed, self.shares, mixing.pairs)  # source of every position, modulo CYCLE
        quotas = np.bincount(self.slots, minlength=len(weights))
        self._quotas = quotas.tolist()
        earlier = np.zeros(CYCLE, dtype=np.int64)  # slots of the same source before this one
        for source in range(len(weights)):
            chosen = self.slots == source
            earlier[chosen] = np.arange(quotas[source])
        self._earlier = earlier
        self._sources = [
            SourceOrder(seed, source, sizes, mixing.window) for source, sizes in enumerate(shard_sizes)
        ]

    def draw(self, position: int) -> tuple[int, int]:
        """The source at `position` and how many samples of that source come before it."""
        cycle, slot = divmod(position, CYCLE)
        source = int(self.slots[slot])
        return source, cycle * self._quotas[source] + int(self._earlier[slot])

    def drawn(self, position: int) -> list[int]:
        """How many samples of every source come before `position`."""
        cycles, slot = divmod(position, CYCLE)
        begun = np.bincount(self.slots[:slot], minlength=len(self._quotas)).tolist()
        return [cycles * quota + more for quota, more in zip(self._quotas, begun, strict=True)]

    def pick(self, source: int, draw: int) -> Pick:
        """The sample that is the `draw`-th (from 0) of `source`."""
        return self._sources[source].pick(draw)

    def __getitem__(self, position: int) -> Pick:
        return self.pick(*self.draw(position))

    def window(self, source: int, draw: int) -> tuple[range, list[int]]:
        """The draws of `source` that share a window of shards with `draw`; the shards of that window,
        and as many as a window has of those that come next, beyond the end of an epoch too.
        """
        return self._sources[source].window(draw)


class SourceOrder:
    """Permutes one source anew each epoch: its shards, then the samples of every window of shards."""

    def __init__(self, seed: int, source: int, shard_sizes: Sequence[int], window: int) -> None:
        self._key, self._shards = (seed, source), window
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
        return Pick(self._key[1], epoch, shards.item(place), indices.item(place))

    def window(self, draw: int) -> tuple[range, list[int]]:
        epoch, place = divmod(draw, self.num_samples)
        shards, starts = self._epoch(epoch)
        window = bisect_right(starts, place) - 1
        ends = [*starts[1:], self.num_samples]
        first = window * self._shards
        num_own = len(shards[first : first + self._shards])  # fewer in an epoch's last window
        wanted = num_own + self._shards
        needed = shards[first : first + wanted].tolist()
        if len(needed) < wanted:
            needed += self._epoch(epoch + 1)[0][: wanted - len(needed)].tolist()
        return range(
            epoch * self.num_samples + starts[window], epoch * self.num_samples + ends[window]
        ), needed

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Permuted shard numbers, and the place in the epoch where each window of them starts."""
        shards = permutation(len(self._sizes), *self._key, epoch)
        starts = np.concatenate([[0], np.cumsum(self._sizes[shards])[:-1]])
        return shards, starts[:: self._shards].tolist()

    def _lay_out_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and index inside the shard of every sample of one window, in order."""
        shards = self._epoch(epoch)[0][window * self._shards : (window + 1) * self._shards]
        sizes = self._sizes[shards]
        order = permutation(int(sizes.sum()), *self._key, epoch, window)
        starts = np.cumsum(sizes) - sizes
        which = np.repeat(np.arange(len(shards), dtype=np.int32), sizes)[order]
        return shards[which].astype(np.int32), (order - starts[which]).astype(np.int32)


def shares(weights: Sequence[float], sizes: Sequence[int], mixing: Mixing) -> list[float]:
    """The part of all samples that each source of so many samples gives; they add up to 1."""
    counted = np.asarray(weights, dtype=np.float64)
    if mixing.by == "size":
        counted = counted / counted.max() * np.asarray(sizes, dtype=np.float64)
    evened = (counted / counted.max()) ** (1 / mixing.temperature)
    return (evened / evened.sum()).tolist()


def source_cycle(seed: int, shares: Sequence[float], pairs: str = "any") -> np.ndarray:
    """The source of each of CYCLE positions: exact shares, evenly spread, shuffled within SHUFFLED positions.

    Shuffling breaks the regular beat of an even spread: of two equal sources one would always be the first
    image of a pair. `pairs` as mixing.pairs. Raises ValueError when a source gets no position, and when pairs of
    different sources are asked of one source or of one that gives more than half of the samples.
    """
    draws = CYCLE // PAIR if pairs == "same" else CYCLE
    if min(shares) * draws < 1 - ROUNDING:
        raise ValueError(
            f"the sources' shares {[float(f'{share:.3g}') for share in shares]} of the samples must be at least 1 in "
            f"{draws}: raise that weight or mixing.temperature, or leave the source out"
        )
    if pairs == "same":
        return _spread(_quotas(shares, draws), seed).repeat(PAIR)
    quotas = _quotas(shares, draws)
    if pairs == "any":
        return _spread(quotas, seed)
    if quotas.max() > CYCLE // PAIR:
        raise ValueError(
            f"mixing.pairs='other' needs an image of a second source for each, one source gives {max(shares):.3g} of "
            "all where half is the most: lower its weight, or ask for 'any'"
        )
    # In a row of all slots, sorted by source, none stands half a row away from its own kind.
    kinds = np.repeat(np.arange(len(quotas)), quotas).reshape(PAIR, -1).T
    kinds, counts = np.unique(kinds, axis=0, return_counts=True)
    chosen = kinds[_spread(counts, seed)]
    is_turned = permutation(len(chosen), seed, len(chosen)) % PAIR == 1
    chosen[is_turned] = chosen[is_turned, ::-1]
    return chosen.reshape(-1)


def _quotas(shares: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers that add up to `total`, each within 1 of its share, by largest remainder."""
    exact = np.asarray(shares) * total
    quotas = np.floor(exact).astype(np.int64)
    for source in np.argsort(quotas - exact, kind="stable")[: total - quotas.sum()]:
        quotas[source] += 1
    return quotas


def _spread(quotas: np.ndarray, seed: int) -> np.ndarray:
    """Each number as often as its quota says, evenly spread, then shuffled within SHUFFLED places."""
    # Place k of a number with q places is due at (k + 1/2) / q of the cycle: sorted due times spread it evenly.
    due = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
    slots = np.repeat(np.arange(len(quotas)), quotas)[np.argsort(due, kind="stable")]
    for block, start in enumerate(range(0, len(slots), SHUFFLED)):
        window = slots[start : start + SHUFFLED]
        slots[start : start + SHUFFLED] = window[permutation(len(window), seed, block)]
    return slots


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) that depends on `key` alone, in every version of numpy.

    RandomState is numpy's frozen generator: its streams never change (NEP 19), so a run resumes exactly.
    """
    return np.random.RandomState([number % 2**32 for number in key]).permutation(size)
