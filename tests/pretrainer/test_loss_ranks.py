"""Do several ranks find the loss and the gradients that one finds with all the rows?"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.kernels import contrastive
from pretrain.likelihoods import bernoulli_nats, decorrelation_nats, uniform_part
from tests.pretrainer.test_contrastive import (
    inputs,
    loss_and_gradients,
    matching_gradients,
    plain_matching,
    plain_nats,
    repeated,
)
from tests.pretrainer.test_likelihoods import decorrelation_inputs, patch_inputs, tag_inputs
from tests.pretrainer.test_sinkhorn import cluster_inputs, prototypes, swapped

ROWS = 12  # of every input, over all ranks


def loss_and_gradient(function, first, *others):
    """A loss of rows, and its gradient by the first of its inputs."""
    leaf = first.clone().requires_grad_()
    loss = function(leaf, *others)
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


def tags(logits, is_positive, has_tags):
    return bernoulli_nats(logits, is_positive, has_tags, 10.0, 4.0, 1.0)


PER_ROW = {  # losses of float32 rows alone, and their inputs
    "decorrelation": (decorrelation_nats, decorrelation_inputs),
    "tags": (tags, tag_inputs),
    "uniform": (uniform_part, patch_inputs),
}


def _rank_gradients(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    images, texts, has_text, scale = inputs(ROWS)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    got = {
        "pairs": loss_and_gradients(
            contrastive.contrastive_nats, images[mine], texts[mine], has_text[mine], scale
        ),
        "repeated": loss_and_gradients(
            contrastive.contrastive_nats,
            images[mine],
            texts[mine],
            has_text[mine],
            scale,
            repeated(ROWS)[mine],
        ),
        "matching": matching_gradients(contrastive.matching_nats, images[mine], texts[mine]),
        "clusters": swapped(prototypes(), cluster_inputs()[:, mine]),
    }
    for name, (function, rows) in PER_ROW.items():
        got[name] = loss_and_gradient(function, *(value[mine] for value in rows()))
    torch.save(got, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def parts(request, tmp_path_factory):
    """What 2 and 4 ranks found, each on its share of the same rows."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank_gradients, (world, str(folder)), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def assert_together(parts, name, expected, per_row, tolerance):
    """The trainer averages losses and parameter gradients over ranks; features belong to one rank each.

    `tolerance` is relative to the largest number of each loss or gradient.
    """
    for index, value in enumerate(expected):
        of_ranks = [part[name][index] for part in parts]
        found = torch.cat(of_ranks) if index in per_row else sum(of_ranks)
        atol = tolerance * value.abs().max().item()
        torch.testing.assert_close(found / len(parts), value, rtol=0, atol=atol)


def test_contrastive(parts):
    expected = loss_and_gradients(plain_nats, *inputs(ROWS))
    assert_together(parts, "pairs", expected, per_row=(1, 2), tolerance=1e-10)


def test_contrastive_with_texts_that_stand_several_times(parts):
    expected = loss_and_gradients(plain_nats, *inputs(ROWS), repeated(ROWS))
    assert_together(parts, "repeated", expected, per_row=(1, 2), tolerance=1e-10)


def test_matching(parts):
    predictions, targets, *_ = inputs(ROWS)
    expected = matching_gradients(plain_matching, predictions, targets)
    assert_together(parts, "matching", expected, per_row=(1,), tolerance=1e-10)


def test_decorrelation(parts):
    expected = loss_and_gradient(decorrelation_nats, *decorrelation_inputs())
    assert_together(parts, "decorrelation", expected, per_row=(1,), tolerance=1e-6)


@pytest.mark.parametrize("name", ["tags", "uniform"])
def test_tags_and_uniform_part(parts, name):
    function, rows = PER_ROW[name]
    expected = loss_and_gradient(function, *rows())
    assert_together(parts, name, expected, per_row=(1,), tolerance=1e-6)


def test_codes_and_clusters(parts):
    *expected, codes = swapped(prototypes(), cluster_inputs())
    found = torch.cat([part["clusters"][-1] for part in parts])
    torch.testing.assert_close(found, codes, rtol=1e-6, atol=1e-6)
    assert_together(parts, "clusters", expected, per_row=(1,), tolerance=1e-6)
