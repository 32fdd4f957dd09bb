"""Which 64-bit hashes lie within a Hamming distance of each other? Exact, for millions, by matching blocks of bits.

The 64 bits are cut into b blocks. Two hashes at distance d or less agree in at least b - d whole blocks, whichever
they are: for every choice of b - d blocks the hashes are sorted by those bits, and only such as share them all are
compared (Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007). More blocks mean more
sorting and fewer comparisons; the cheapest plan for the given numbers is taken, all pairs among few hashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb, log2

import numpy as np

BITS = 64
PIECE = 1 << 20  # pairs compared at a time
MOST_BLOCKS_MORE = 5  # blocks beyond the distance that are considered
SEEK = 1.5  # cost of looking one hash up in one table, in comparisons, for each doubling of the table


@dataclass(frozen=True)
class Index:
    """Hashes to look others up among."""

    values: np.ndarray  # uint64 [n], distinct
    distance: int  # bits
    masks: tuple[int, ...]  # of a table each: the bits that must agree
    keys: tuple[np.ndarray, ...]  # uint64 [n], the masked values in order
    orders: tuple[np.ndarray, ...]  # int64 [n], positions of `keys` in `values`


def index_of(values: np.ndarray, distance: int, num_queries: int) -> Index:
    """An index of distinct uint64 hashes that `num_queries` others will be looked up in, all tables in memory.

    16 bytes a hash and table. Raises ValueError for a distance outside [0, 32].
    """
    masks = plan(num_queries, len(values), distance)
    keys, orders = zip(*(_table(values, mask) for mask in masks), strict=True)
    return Index(values, distance, masks, keys, orders)


def plan(num_queries: int, num_values: int, distance: int) -> tuple[int, ...]:
    """The masks of the cheapest set of tables; (0,) compares all with all."""
    if not 0 <= distance <= BITS // 2:
        raise ValueError(f"distance={distance} must lie in [0, {BITS // 2}]: pass --distance 4")
    if num_queries * num_values == 0:
        return (0,)
    costs = {0: float(num_queries) * num_values}
    for blocks in range(distance + 1, min(BITS, distance + MOST_BLOCKS_MORE) + 1):
        kept = blocks - distance
        bits = BITS * kept // blocks
        seek = SEEK * max(1.0, log2(num_values)) * num_queries
        costs[blocks] = comb(blocks, kept) * (seek + num_queries * num_values / 2.0**bits)
    blocks = min(costs, key=lambda blocks: costs[blocks])
    if blocks == 0:
        return (0,)
    edges = [BITS * block // blocks for block in range(blocks + 1)]
    parts = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    return tuple(sum(chosen) for chosen in combinations(parts, blocks - distance))


def _table(values: np.ndarray, mask: int) -> tuple[np.ndarray, np.ndarray]:
    masked = values & np.uint64(mask)
    order = np.argsort(masked, kind="stable")
    return masked[order], order


def look_up(index: Index, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (position in `queries`, position in the index) within the distance, each once, in order; int64."""
    found = [
        _pairs(queries, index.values, mask, keys, order, index.distance)
        for mask, keys, order in zip(index.masks, index.keys, index.orders, strict=True)
    ]
    return _once(found, len(index.values))


def pairs_within(values: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs i < j of distinct uint64 hashes within `distance` bits, each once, in order of i.

    Memory: 40 bytes a hash, and 16 a pair.
    """
    found = []
    for mask in plan(len(values), len(values), distance):
        keys, order = _table(values, mask)
        found.append(_neighbours(values[order], keys, order, distance))
    return _once(found, len(values))


def _neighbours(
    hashes: np.ndarray, keys: np.ndarray, order: np.ndarray, distance: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs within the distance among hashes of equal keys, which stand beside each other."""
    lefts, rights = [], []
    active, shift = np.arange(len(keys)), 0
    while len(active):
        shift += 1
        active = active[: np.searchsorted(active, len(keys) - shift)]
        active = active[keys[active] == keys[active + shift]]
        near = active[np.bitwise_count(hashes[active] ^ hashes[active + shift]) <= distance]
        one, other = order[near], order[near + shift]
        lefts.append(np.minimum(one, other))
        rights.append(np.maximum(one, other))
    return np.concatenate([np.empty(0, np.int64), *lefts]), np.concatenate([np.empty(0, np.int64), *rights])


def _pairs(
    queries: np.ndarray, values: np.ndarray, mask: int, keys: np.ndarray, order: np.ndarray, distance: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs within the distance among those that agree in the bits of the mask; PIECE candidates at a time."""
    wanted = queries & np.uint64(mask)
    asked = np.argsort(wanted, kind="stable")  # neighbours in the table are looked up together: caches
    first = np.searchsorted(keys, wanted[asked], "left")
    counts = np.searchsorted(keys, wanted[asked], "right") - first
    ends = np.cumsum(counts)
    lefts, rights = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    begin = 0
    while begin < len(queries):
        done = int(ends[begin] - counts[begin])
        end = max(begin + 1, int(np.searchsorted(ends, done + PIECE, "right")))
        some = counts[begin:end]
        left = np.repeat(asked[begin:end], some)
        place = np.arange(int(some.sum())) + np.repeat(
            first[begin:end] - (ends[begin:end] - some - done), some
        )
        right = order[place]
        is_near = np.bitwise_count(queries[left] ^ values[right]) <= distance
        lefts.append(left[is_near])
        rights.append(right[is_near])
        begin = end
    return np.concatenate(lefts), np.concatenate(rights)


def _once(found: list[tuple[np.ndarray, np.ndarray]], num_values: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of all tables without repetition."""
    pairs = np.unique(np.concatenate([left * num_values + right for left, right in found]))
    return pairs // max(1, num_values), pairs % max(1, num_values)
