"""Does the order deliver every sample once an epoch, and the sources in their shares?"""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import Mixing
from pretrain.data.order import CYCLE, PAIR, Order, SourceOrder, permutation, shares, source_cycle

WINDOW = Mixing().window


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=80),
    window=st.integers(1, 90),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_each_sample_exactly_once(
    sizes: list[int], window: int, seed: int, epoch: int
) -> None:
    order = SourceOrder(seed, 0, sizes, window)
    total = sum(sizes)
    picks = [order.pick(draw) for draw in range(epoch * total, (epoch + 1) * total)]
    everything = {(shard, index) for shard, size in enumerate(sizes) for index in range(size)}
    assert len(picks) == len(everything)
    assert {(pick.shard, pick.index) for pick in picks} == everything
    assert {pick.epoch for pick in picks} == {epoch}


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), window=st.integers(1, 40))
def test_the_shards_of_a_window_and_the_next_are_known_ahead(sizes: list[int], window: int) -> None:
    """In every window of two epochs: at the end of one too, where those of the next come first."""
    order = SourceOrder(3, 0, sizes, window)
    draws, needed = order.window(0)
    while draws.start < 2 * sum(sizes):
        own = {order.pick(draw).shard for draw in draws}
        assert len(set(needed)) <= 2 * window and own == set(needed[: len(own)])
        # An epoch's last window may be of one shard: those that come next take as long to copy as any others.
        assert len(needed) >= len(own) + min(window, len(sizes))
        assert all(order.window(draw) == (draws, needed) for draw in (draws[len(draws) // 2], draws[-1]))
        following, of_next = order.window(draws.stop)
        assert following.start == draws.stop
        assert {order.pick(draw).shard for draw in following} <= set(needed)
        draws, needed = following, of_next


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, 1.0), (3.0, 1.0), (400.0, 15.0, 12.0, 15.0), (0.2, 0.3, 0.5)]
)
def test_any_thousand_positions_hold_the_shares_to_one_sample(weights: tuple[float, ...]) -> None:
    order = Order(0, weights, [[7, 5]] * len(weights))
    sources = np.array([order.draw(position)[0] for position in range(3 * CYCLE)])
    for start in (0, 1, 613, 1999):
        counts = np.bincount(sources[start : start + CYCLE], minlength=len(weights))
        assert np.abs(counts - CYCLE * np.array(weights) / sum(weights)).max() <= 1


@settings(max_examples=40, deadline=None)
@given(
    sources=st.lists(
        st.tuples(st.floats(0.1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=9)),
        min_size=1,
        max_size=5,
    ),
    by=st.sampled_from(["weight", "size"]),
    temperature=st.floats(0.5, 9),
    pairs=st.sampled_from(["any", "same", "other"]),
    window=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 5 * CYCLE),
)
def test_any_thousand_positions_of_any_mixture(
    sources: list[tuple[float, list[int]]],
    by: str,
    temperature: float,
    pairs: str,
    window: int,
    seed: int,
    start: int,
) -> None:
    """Shares to one sample or pair, and every source in whole epochs: what a pass has begun comes before the next."""
    weights, sizes = [weight for weight, _ in sources], [of_source for _, of_source in sources]
    mixing = Mixing(by=by, temperature=temperature, pairs=pairs, window=window)
    unit = PAIR if pairs == "same" else 1
    try:
        order = Order(seed, weights, sizes, mixing)
    except ValueError:
        wanted = shares(weights, [sum(one) for one in sizes], mixing)
        assert min(wanted) < unit / CYCLE or (pairs == "other" and max(wanted) > 1 / PAIR)
        return
    picks = [order[position] for position in range(start, start + CYCLE)]
    counts = np.bincount([pick.source for pick in picks], minlength=len(sources))
    assert np.abs(counts - CYCLE * np.array(order.shares)).max() < unit + 1e-9
    pair = order.slots.reshape(-1, PAIR)
    is_same = pair[:, 0] == pair[:, 1]
    assert {"any": True, "same": is_same.all(), "other": not is_same.any()}[pairs]
    for source, of_source in enumerate(sizes):
        mine = [pick for pick in picks if pick.source == source]
        assert [pick.epoch for pick in mine] == sorted(pick.epoch for pick in mine)
        by_epoch = Counter(pick.epoch for pick in mine)
        distinct = Counter(epoch for epoch, *_ in {(p.epoch, p.shard, p.index) for p in mine})
        assert by_epoch == distinct, "a sample came twice in one epoch"
        assert all(by_epoch[epoch] == sum(of_source) for epoch in sorted(by_epoch)[1:-1])


def test_shares_by_size_and_temperature_by_hand() -> None:
    assert shares([1, 1], [300, 100], Mixing()) == [0.5, 0.5]
    assert shares([1, 1], [300, 100], Mixing(by="size")) == pytest.approx([0.75, 0.25])
    assert shares([1, 3], [300, 100], Mixing(by="size")) == pytest.approx([0.5, 0.5])
    assert shares([1, 1], [900, 100], Mixing(by="size", temperature=2)) == pytest.approx([0.75, 0.25])
    assert shares([8, 1], [1, 1], Mixing(temperature=1e9)) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0, 1.0), (5.0, 3.0, 2.0, 1.0)])
def test_pairs_of_one_source_and_of_two(weights: tuple[float, ...]) -> None:
    exact = CYCLE * np.array(weights) / sum(weights)
    same = source_cycle(5, [weight / sum(weights) for weight in weights], "same")
    assert (same[0::2] == same[1::2]).all()
    assert np.abs(np.bincount(same) - exact).max() <= 2
    other = source_cycle(5, [weight / sum(weights) for weight in weights], "other")
    assert (other[0::2] != other[1::2]).all()
    assert np.abs(np.bincount(other) - exact).max() <= 1
    first = np.bincount(other[0::2], minlength=len(weights))
    assert np.abs(2 * first - np.bincount(other)).max() < 120, (
        "each source is the first image of half its pairs"
    )


def test_pairs_of_two_sources_need_two_that_can_meet() -> None:
    with pytest.raises(
        ValueError, match=r"one source gives 0.6 of all where half is the most: lower its weight"
    ):
        source_cycle(0, [0.6, 0.4], "other")


def test_shares_hold_in_short_stretches_too() -> None:
    slots = source_cycle(0, (0.5, 0.25, 0.25))
    for start in range(0, CYCLE, 8):
        counts = np.bincount(slots[start : start + 8], minlength=3)
        assert np.abs(counts - np.array([4, 2, 2])).max() <= 2


def test_what_was_drawn_is_counted_by_source() -> None:
    order = Order(5, (3.0, 1.0, 2.5), [[7], [4, 4], [30]])
    sources = [order.draw(position)[0] for position in range(2345)]
    assert order.drawn(2345) == [sources.count(source) for source in range(3)]
    assert order.drawn(0) == [0, 0, 0] and sum(order.drawn(7000)) == 7000


def test_each_source_is_drawn_without_gaps() -> None:
    order = Order(3, (5.0, 2.0, 1.0), [[4], [9, 9], [3]])
    draws = [order.draw(position) for position in range(2 * CYCLE + 17)]
    for source in range(3):
        mine = [count for chosen, count in draws if chosen == source]
        assert mine == list(range(len(mine)))


def test_both_images_of_a_pair_come_from_either_source() -> None:
    slots = source_cycle(0, (0.5, 0.5)).reshape(-1, 2)
    kinds = Counter(map(tuple, slots.tolist()))
    assert set(kinds) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert min(kinds.values()) > 60  # of 500 pairs; an unshuffled spread has one kind only


def test_epochs_and_seeds_and_sources_shuffle_differently() -> None:
    def first(order: SourceOrder, epoch: int) -> list[tuple[int, int]]:
        picks = (order.pick(draw) for draw in range(epoch * 50, epoch * 50 + 50))
        return [(pick.shard, pick.index) for pick in picks]

    sizes = [10] * 5
    orders = [first(SourceOrder(seed, source, sizes, WINDOW), epoch) for seed, source, epoch in
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
    with pytest.raises(ValueError, match=r"at least 1 in 1000: raise that weight or mixing\.temperature"):
        Order(0, (10_000.0, 1.0), [[1], [1]])


def test_the_least_share_and_the_largest_weights_are_taken() -> None:
    order = Order(0, (999.0, 1.0), [[5], [5]])
    assert [order.draw(position)[0] for position in range(1000)].count(1) == 1
    vast = Order(0, (1e308, 1e308), [[6, 3], [1]], Mixing(by="size"))
    assert vast.shares == pytest.approx([0.9, 0.1])


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
