"""Is the sequence of samples the same on any number of ranks and workers, and whole?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from pretrain.config import Mixing, Source
from tests.data.delivered import assert_same, batches, joined
from tests.data.sets import encoded, good_set, picture, small_run, write_set

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking would start processes for an hour
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores
@settings(
    max_examples=8, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.tuples(SIZES, SIZES),
    worlds=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    workers=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    weights=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    mixing=st.builds(
        Mixing,
        by=st.sampled_from(["weight", "size"]),
        temperature=st.sampled_from([1.0, 3.0]),
        pairs=st.sampled_from(["any", "same"]),
        window=st.integers(1, 3),
    )
    | st.builds(Mixing, pairs=st.just("other"), window=st.integers(1, 3)),
    stop=st.integers(0, 3),
    with_workers=st.integers(0, 7),
)
@example(
    sizes=([3, 1], [2]),
    worlds=(8, 5),
    workers=(1, 3),
    weights=(2.0, 1.0),
    mixing=Mixing(window=1),
    stop=2,
    with_workers=2,
)
@example(
    sizes=([2], [4, 1]),
    worlds=(1, 8),
    workers=(4, 1),
    weights=(1.0, 1.0),
    mixing=Mixing(pairs="same"),
    stop=1,
    with_workers=0,
)
@example(
    sizes=([5], [1]),
    worlds=(8, 1),
    workers=(0, 4),
    weights=(1.0, 3.0),
    mixing=Mixing(by="size"),
    stop=1,
    with_workers=6,
)
def test_another_number_of_ranks_and_workers_goes_on_with_the_same_sequence(
    tmp_path_factory: pytest.TempPathFactory,
    folders: dict[str, Path],
    sizes: tuple[list[int], list[int]],
    worlds: tuple[int, int],
    workers: tuple[int, int],
    weights: tuple[float, float],
    mixing: Mixing,
    stop: int,
    with_workers: int,
) -> None:
    """Pixels, boxes, masks and tokens bit for bit, of any data, at any step and however sources are mixed.

    One rank alone, any of them, has processes, to make few.
    """
    root = tmp_path_factory.mktemp("drawn")
    drawn = {
        "names": good_set(root / "names", sizes[0], has_text=False),
        "talk": good_set(root / "talk", sizes[1], has_category=False),
    }
    tokenizer = folders["talk"] / "tokenizer"
    if mixing.pairs == "other":  # of two sources, which must give half each
        weights = (1.0, 1.0)
    data = {"names": Source("category", weights[0]), "talk": Source("text", weights[1])}
    run = small_run(batch=2 * worlds[0] * worlds[1], mixing=mixing, data=data)
    straight = batches(run, drawn, 4, tokenizer=tokenizer)
    for world, some, steps in zip(worlds, workers, (range(stop), range(stop, 4)), strict=True):
        ranks = [
            batches(
                run,
                drawn,
                len(steps),
                tokenizer=tokenizer,
                rank=rank,
                world=world,
                start_step=steps.start,
                workers=some if rank == with_workers % world else 0,
            )
            for rank in range(world)
        ]
        for step in steps:
            assert_same(straight[step], joined([rank[step - steps.start] for rank in ranks]))


def numbered_set(folder: Path, sizes: list[int]) -> Path:
    """Shards of such sizes, whose samples are told apart by their category, 0 for the first of the set."""
    image, numbers = encoded(picture(0, 16, 16)), iter(range(sum(sizes)))
    shards = [[{"jpg": image, "cls": str(next(numbers)).encode()} for _ in range(size)] for size in sizes]
    return write_set(folder, shards, tuple(f"{folder.name} {number}" for number in range(sum(sizes))))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@settings(
    max_examples=6, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.tuples(SIZES, SIZES),
    world=st.integers(1, 8),
    workers=st.integers(0, 4),
    with_workers=st.integers(0, 7),
    weights=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    window=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@example(
    sizes=([5, 1, 3], [2, 4]),
    world=3,
    workers=2,
    with_workers=1,
    weights=(2.0, 1.0),
    window=2,
    seed=0,
)
def test_each_epoch_delivers_each_sample_of_a_source_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: tuple[list[int], list[int]],
    world: int,
    workers: int,
    with_workers: int,
    weights: tuple[float, float],
    window: int,
    seed: int,
) -> None:
    """Of the source that is drawn most, one epoch and a quarter at least."""
    root = tmp_path_factory.mktemp("numbered")
    sets = {name: numbered_set(root / name, some) for name, some in zip(("one", "two"), sizes, strict=True)}
    data = {name: Source("category", weight) for name, weight in zip(sets, weights, strict=True)}
    run = small_run(batch=2 * world, mixing=Mixing(window=window), data=data, seed=seed)
    totals = [sum(some) for some in sizes]
    num_steps = -(-5 * sum(totals) // 2 // run.batch)
    ranks = [
        batches(
            run,
            sets,
            num_steps,
            rank=rank,
            world=world,
            workers=workers if rank == with_workers % world else 0,
        )
        for rank in range(world)
    ]
    told = torch.cat([rank[step].category for step in range(num_steps) for rank in ranks]).tolist()
    of_source = [
        [one for one in told if one < totals[0]],
        [one - totals[0] for one in told if one >= totals[0]],
    ]
    assert any(len(found) > total for found, total in zip(of_source, totals, strict=True))
    for found, total in zip(of_source, totals, strict=True):
        epochs = [found[start : start + total] for start in range(0, len(found), total)]
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch)
        assert all(set(epoch) == set(range(total)) for epoch in epochs[:-1])
