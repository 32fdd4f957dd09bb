"""Do several ranks find the loss and the gradients that one finds with all the rows?"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pretrain.config import Projection
from pretrain.kernels import contrastive
from pretrain.likelihoods import (
    bernoulli_nats,
    category_nats,
    decorrelation_nats,
    mean_over_labelled,
    uniform_part,
)
from pretrain.scoring import dense_matching
from tests.engine.launch import together
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
    return mean_over_labelled(bernoulli_nats(logits, is_positive, 10.0, 4.0, 1.0), has_tags)


def category(logits, labels):
    return mean_over_labelled(category_nats(logits, labels, 0.1), labels >= 0)


def category_inputs():
    """Logits and labels of ROWS; half of the first rows have none, all of the others one."""
    labels = torch.arange(ROWS) % 5
    labels[: ROWS // 2 : 2] = -1
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(4)), labels


def dense(prediction, z_y, position):
    return dense_matching(Projection(dense_samples=4), prediction, z_y, position).mean()


def uniform(prediction, target):
    return uniform_part(prediction, target).mean()


def pair_nats(*inputs):
    return contrastive.contrastive_nats(*inputs)[0]


def matching(*inputs):
    return contrastive.matching_nats(*inputs).mean()


def dense_inputs():
    generator = torch.Generator().manual_seed(5)
    prediction, z_y = (torch.randn(ROWS, 9, 6, generator=generator) for _ in range(2))
    return prediction, z_y, torch.randperm(100, generator=generator)[:ROWS]


PER_ROW = {  # losses of float32 rows alone, and their inputs
    "decorrelation": (decorrelation_nats, decorrelation_inputs),
    "tags": (tags, tag_inputs),
    "uniform": (uniform, patch_inputs),
    "category": (category, category_inputs),
    "dense": (dense, dense_inputs),
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-6}  # of the largest number of each loss or gradient


def pairs_of(dtype):
    """Images, texts, which of them have a text, and the scale: the same numbers in either precision."""
    images, texts, has_text, scale = inputs(ROWS)
    return images.float().to(dtype), texts.float().to(dtype), has_text, scale.to(dtype)


def _rank_gradients(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    got = {"clusters": swapped(prototypes(), cluster_inputs()[:, mine])}
    for dtype in TOLERANCES:
        *rows, scale = pairs_of(dtype)
        images, texts, has_text = (values[mine] for values in rows)
        ids = repeated(ROWS)[mine]
        got[f"pairs {dtype}"] = loss_and_gradients(pair_nats, images, texts, has_text, scale)
        got[f"repeated {dtype}"] = loss_and_gradients(pair_nats, images, texts, has_text, scale, ids)
        got[f"matching {dtype}"] = matching_gradients(matching, images, texts)
    for name, (function, rows) in PER_ROW.items():
        got[name] = loss_and_gradient(function, *(value[mine] for value in rows()))
    torch.save(got, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def parts(request, tmp_path_factory):
    """What 2 and 4 ranks found, each on its share of the same rows."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    together(_rank_gradients, world, str(folder), world=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def assert_together(parts, name, expected, per_row, tolerance):
    """The trainer averages losses and parameter gradients over ranks; features belong to one rank each.

    `tolerance` is relative to the largest number of each loss or gradient.
    """
    for index, value in enumerate(expected):
        of_ranks = [part[name][index] for part in parts]
        found = torch.cat(of_ranks) if index in per_row else sum(of_ranks)
        atol = tolerance * value.abs().max().item()
        torch.testing.assert_close((found / len(parts)).to(value.dtype), value, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_contrastive(parts, dtype):
    expected = loss_and_gradients(plain_nats, *pairs_of(torch.float64))
    assert_together(parts, f"pairs {dtype}", expected, per_row=(1, 2), tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_contrastive_with_texts_that_stand_several_times(parts, dtype):
    expected = loss_and_gradients(plain_nats, *pairs_of(torch.float64), repeated(ROWS))
    assert_together(parts, f"repeated {dtype}", expected, per_row=(1, 2), tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_matching(parts, dtype):
    predictions, targets, *_ = pairs_of(torch.float64)
    expected = matching_gradients(plain_matching, predictions, targets)
    assert_together(parts, f"matching {dtype}", expected, per_row=(1,), tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("name", PER_ROW)
def test_losses_of_rows_alone(parts, name):
    function, rows = PER_ROW[name]
    expected = loss_and_gradient(function, *rows())
    assert_together(parts, name, expected, per_row=(1,), tolerance=1e-6)


def test_codes_and_clusters(parts):
    *expected, codes = swapped(prototypes(), cluster_inputs())
    found = torch.cat([part["clusters"][-1] for part in parts])
    torch.testing.assert_close(found, codes, rtol=1e-6, atol=1e-6)
    assert_together(parts, "clusters", expected, per_row=(1,), tolerance=1e-6)
