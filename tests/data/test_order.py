"""Does the order deliver every sample once an epoch, and the sources in their shares?"""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import CYCLE, Order, SourceOrder, permutation, source_cycle


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=80),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_each_sample_exactly_once(sizes: list[int], seed: int, epoch: int) -> None:
    order = SourceOrder(seed, 0, sizes)
    total = sum(sizes)
    picks = [order.pick(draw) for draw in range(epoch * total, (epoch + 1) * total)]
    everything = {(shard, index) for shard, size in enumerate(sizes) for index in range(size)}
    assert len(picks) == len(everything)
    assert {(pick.shard, pick.index) for pick in picks} == everything
    assert {pick.epoch for pick in picks} == {epoch}


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, 1.0), (3.0, 1.0), (400.0, 15.0, 12.0, 15.0), (0.2, 0.3, 0.5)]
)
def test_any_thousand_positions_hold_the_shares_to_one_sample(weights: tuple[float, ...]) -> None:
    order = Order(0, weights, [[7, 5]] * len(weights))
    sources = np.array([order.draw(position)[0] for position in range(3 * CYCLE)])
    for start in (0, 1, 613, 1999):
        counts = np.bincount(sources[start : start + CYCLE], minlength=len(weights))
        assert np.abs(counts - CYCLE * np.array(weights) / sum(weights)).max() <= 1


def test_shares_hold_in_short_stretches_too() -> None:
    slots = source_cycle(0, (2.0, 1.0, 1.0))
    for start in range(0, CYCLE, 8):
        counts = np.bincount(slots[start : start + 8], minlength=3)
        assert np.abs(counts - np.array([4, 2, 2])).max() <= 2


def test_each_source_is_drawn_without_gaps() -> None:
    order = Order(3, (5.0, 2.0, 1.0), [[4], [9, 9], [3]])
    draws = [order.draw(position) for position in range(2 * CYCLE + 17)]
    for source in range(3):
        mine = [count for chosen, count in draws if chosen == source]
        assert mine == list(range(len(mine)))


def test_both_images_of_a_pair_come_from_either_source() -> None:
    slots = source_cycle(0, (1.0, 1.0)).reshape(-1, 2)
    kinds = Counter(map(tuple, slots.tolist()))
    assert set(kinds) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert min(kinds.values()) > 60  # of 500 pairs; an unshuffled spread has one kind only


def test_epochs_and_seeds_and_sources_shuffle_differently() -> None:
    def first(order: SourceOrder, epoch: int) -> list[tuple[int, int]]:
        picks = (order.pick(draw) for draw in range(epoch * 50, epoch * 50 + 50))
        return [(pick.shard, pick.index) for pick in picks]

    sizes = [10] * 5
    orders = [first(SourceOrder(seed, source, sizes), epoch) for seed, source, epoch in
              [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)]]  # fmt: skip
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_never_changes_between_versions() -> None:
    # frozen values: a resumed run must see the order in which it began
    assert permutation(6, 1, 2, 3).tolist() == [0, 2, 4, 5, 3, 1]
    order = Order(7, (2.0, 1.0), [[3, 4], [5]])
    picks = [order[position] for position in range(4)]
    assert [(p.source, p.epoch, p.shard, p.index) for p in picks] == [
        (1, 0, 0, 4),
        (1, 0, 0, 0),
        (0, 0, 0, 2),
        (0, 0, 1, 0),
    ]


def test_a_source_with_too_small_a_share_is_refused() -> None:
    with pytest.raises(ValueError, match="1 in 1000: raise that weight"):
        source_cycle(0, (10_000.0, 1.0))


def test_forty_thousand_shards_start_and_draw_fast() -> None:
    start = time.process_time()
    order = Order(0, (1.0,), [[10_000] * 41_455])
    order[0]
    assert time.process_time() - start < 5
    start = time.process_time()
    for position in range(1, 2001):
        order[position]
    # 6 microseconds each without the type checks of the tests; laying out each draw anew takes 100 times that
    assert (time.process_time() - start) / 2000 < 300e-6
