"""Are both views of an image inputs, each with a mask of its own?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.config import Mask, Run, Source
from pretrain.data.batch import Batch
from pretrain.objective import Input, Objective, Target
from pretrain.objectives import OBJECTIVES
from pretrain.report.pairs import read_pairs
from tests.data.delivered import assert_same, batches, joined
from tests.data.sets import good_set, small_run
from tests.fakes import random_batch

PIXELS = Target("pixels", "laplace", "same", "raw", "none", scored="hidden")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"names": good_set(tmp_path_factory.mktemp("sets") / "names", has_text=False)}


def masked_run(views: int = 2, **changes: object) -> Run:
    """Masked views that predict their own pixels, nothing of the other view."""
    objective = Objective(Input(is_masked=True, views=views), {"pixels": PIXELS})
    settings = {"objective": objective, "data": {"names": Source("none")}, "batch": 6, **changes}
    return small_run(**{"mask": Mask(patch=4, shape="scattered"), **settings})


def test_the_second_view_is_made_though_no_target_asks_for_it(folders: dict[str, Path]) -> None:
    batch = batches(masked_run(), folders, 1)[0]
    assert batch.views.flatten(2).any(2).all() and (batch.boxes[..., 2:4] > 0).all()
    assert not torch.equal(batch.views[:, 0], batch.views[:, 1])


@pytest.mark.parametrize(
    "drawn", [Mask(patch=4, min_block=4), Mask(patch=4, shape="scattered")], ids=lambda mask: mask.shape
)
def test_every_input_has_a_mask_of_its_own(folders: dict[str, Path], drawn: Mask) -> None:
    run = masked_run(mask=drawn)
    mask = joined(batches(run, folders, 40)).mask.flatten(1)
    assert mask.shape == (480, 16) and mask.sum(1).eq(8).all()
    first, second = mask[0::2].double(), mask[1::2].double()
    # two independent halves of 16 patches share 4; the mean of 240 pairs within five standard deviations of one
    shared = (first * second).sum(1)
    assert (
        float((shared.mean() - (first.mean(0) * second.mean(0)).sum()).abs())
        < 5 * float(shared.std()) / 240**0.5
    )
    assert int((first != second).any(1).sum()) > 200


def test_view_1_has_the_mask_that_it_has_alone(folders: dict[str, Path]) -> None:
    both, one = batches(masked_run(2), folders, 1)[0], batches(masked_run(1), folders, 1)[0]
    assert torch.equal(both.mask[0::2], one.mask) and torch.equal(both.views[:, 0], one.views[:, 0])


def test_nothing_is_hidden_of_whole_views(folders: dict[str, Path]) -> None:
    target = Target("clusters", "boltzmann", "other", "learned", "sinkhorn")
    run = masked_run(objective=Objective(Input(views=2), {"clusters": target}))
    mask = batches(run, folders, 1)[0].mask
    assert mask.shape == (12, 4, 4) and not mask.any()


def test_resume_and_any_number_of_ranks_give_the_same_batches(folders: dict[str, Path]) -> None:
    straight = batches(masked_run(), folders, 5)
    for one, other in zip(straight[3:], batches(masked_run(), folders, 2, start_step=3), strict=True):
        assert_same(one, other)
    ranks = [batches(masked_run(), folders, 5, rank=rank, world=3) for rank in range(3)]
    for step in range(5):
        assert_same(straight[step], joined([rank[step] for rank in ranks]))


def test_both_ways_exchanges_views_and_boxes_in_every_second_row(folders: dict[str, Path]) -> None:
    batch = batches(masked_run(objective=OBJECTIVES["hvp_tags_clusters_pixels"]), folders, 1)[0]
    doubled = batch.both_ways()
    for image in range(6):
        for row, order in ((2 * image, [0, 1]), (2 * image + 1, [1, 0])):
            assert torch.equal(doubled.views[row], batch.views[image, order])
            assert torch.equal(doubled.boxes[row], batch.boxes[image, order])
            for name in ("sizes", "category", "tokens", "token_mask", "tags", "has_tags", "position"):
                assert torch.equal(getattr(doubled, name)[row], getattr(batch, name)[image]), name
    assert torch.equal(doubled.mask, batch.mask)
    assert not torch.equal(batch.boxes[:, 0], batch.boxes[:, 1])


def test_a_batch_of_one_view_an_image_has_no_other_way(folders: dict[str, Path]) -> None:
    with pytest.raises(AssertionError, match="one mask an input"):
        batches(masked_run(1), folders, 1)[0].both_ways()


def test_the_report_draws_the_mask_of_view_1(folders: dict[str, Path]) -> None:
    batch = batches(masked_run(), folders, 1)[0]
    for k, pair in enumerate(read_pairs(masked_run(), folders, None, 6)):
        assert torch.equal(torch.from_numpy(pair.mask), batch.mask[2 * k])


def test_random_batches_of_the_tests_have_the_shapes_of_delivered_ones(folders: dict[str, Path]) -> None:
    run = masked_run()
    delivered, random = batches(run, folders, 1)[0], random_batch(run, 6)
    assert shapes(random) == shapes(delivered)
    assert random.mask.flatten(1).sum(1).eq(8).all() and not torch.equal(random.mask[0], random.mask[1])
    tagged = random_batch(replace(run, objective=OBJECTIVES["hvp_mtl"]), 6)
    assert tagged.has_tags.all() and set((tagged.tags >= 0).sum(1).tolist()) <= {1, 2, 3}


def shapes(batch: Batch) -> dict[str, tuple]:
    """Shape and type of every field."""
    return {name: (tuple(value.shape), value.dtype) for name, value in vars(batch).items()}
