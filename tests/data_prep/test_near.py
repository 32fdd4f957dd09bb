"""Are all pairs of near hashes found, and no others, and are duplicates counted right?"""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.doctor.duplicates import exact_duplicates, near_duplicates
from data_prep.doctor.near import index_of, look_up, pairs_within, plan

FEW, MANY = 10, 10**8  # queries for which all pairs are compared, or tables are made


@pytest.fixture(scope="module")
def hashes() -> np.ndarray:
    """Random ones, and some that are changed in a few random bits."""
    generator = np.random.default_rng(0)
    base = generator.integers(0, 2**64, 800, np.uint64)
    near = base[:400].copy()
    for _ in range(7):
        near ^= np.uint64(1) << generator.integers(0, 64, len(near)).astype(np.uint64)
    return np.unique(np.concatenate([base, near, base[:200] ^ np.uint64(0b101)]))


def _all_pairs(left: np.ndarray, right: np.ndarray, distance: int) -> list[tuple[int, int]]:
    rows, columns = np.nonzero(np.bitwise_count(left[:, None] ^ right[None]) <= distance)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


@pytest.mark.parametrize("distance", [0, 1, 2, 4, 6, 7])
def test_pairs_among_hashes_are_those_that_comparing_all_gives(hashes, distance):
    left, right = pairs_within(hashes, distance)
    expected = [(a, b) for a, b in _all_pairs(hashes, hashes, distance) if a < b]
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == expected


@pytest.mark.parametrize("num_queries", [FEW, MANY])
@pytest.mark.parametrize("distance", [0, 2, 6, 10])
def test_looking_up_gives_what_comparing_all_gives(hashes, distance, num_queries, monkeypatch):
    monkeypatch.setattr("data_prep.doctor.near.PIECE", 1000)  # many pieces
    index = index_of(hashes, distance, num_queries)
    left, right = look_up(index, hashes[::3])
    expected = _all_pairs(hashes[::3], hashes, distance)
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == expected


def test_millions_are_matched_by_blocks_and_few_one_by_one():
    assert plan(10, 10, 4) == (0,)
    masks = plan(10**6, 10**6, 4)
    assert len(masks) > 5 and all(bin(mask).count("1") >= 20 for mask in masks)


def test_nothing_is_near_in_nothing():
    nothing = np.empty(0, np.uint64)
    assert [len(side) for side in pairs_within(nothing, 4)] == [0, 0]
    assert near_duplicates(nothing, 4).num_groups == exact_duplicates(nothing).num_groups == 0


def test_a_distance_beyond_half_the_bits_is_refused():
    with pytest.raises(ValueError, match=r"distance=33 must lie in \[0, 32\]: pass"):
        plan(5, 5, 33)


def test_exact_duplicates_are_counted_and_named():
    found = exact_duplicates(np.array([7, 3, 7, 9, 3, 3], np.uint64))
    assert (found.num_groups, found.num_samples, found.num_extra) == (2, 5, 3)
    assert found.examples == ((1, 4, 5), (0, 2))


def test_chains_of_near_pictures_are_one_group_and_flat_ones_are_left_aside():
    start = 0xFFFF_FFFF_0000_0000
    chain = [start, start ^ 0b1111, start ^ 0b1111_1111, start ^ 0xFFFF_0000, 1, 1, 1 << 63]
    found = near_duplicates(np.array([*chain, start], np.uint64), 4)
    assert (found.num_groups, found.num_samples, found.num_flat) == (1, 4, 3)
    assert found.examples == ((0, 1, 2, 7),)
