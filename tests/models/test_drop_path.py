"""Does an image drop the same branches whoever computes it, and as often as it should?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from pretrain.config import Backbone
from pretrain.inputs import input_keys
from pretrain.kernels.splitmix import splitmix64
from pretrain.models.backbone import build_encoder
from pretrain.models.drop_path import DropPath, DropPaths, replace_timm, set_linear
from pretrain.recipes import load
from tests.fakes import random_batch, shrink

FAMILIES = ("internimage", "swin", "vit")


def drawn(keys, *probabilities):
    """Shares of every branch with one of these probabilities, [branches, b]."""
    model = nn.ModuleList(DropPath(p) for p in probabilities)
    DropPaths(model).draw(keys)
    return torch.stack([path.share(torch.ones(len(keys), 1)) for path in model])


def tiny(family, drop_path):
    return build_encoder(Backbone(family, f"{family}_tiny", drop_path, "linear", token_width=64), 64)


def test_branches_are_dropped_with_their_probability_and_independently():
    keys = splitmix64(torch.arange(20000))
    shares = drawn(keys, 0.25, 0.25, 0.6)
    assert sorted(shares[0].unique().tolist()) == pytest.approx([0, 4 / 3])
    assert shares.mean(dim=1).tolist() == pytest.approx([1, 1, 1], abs=0.03)
    assert torch.corrcoef(shares).triu(1).abs().max() < 0.03
    again = drawn(keys.roll(1), 0.25)[0]
    assert torch.corrcoef(torch.stack([shares[0], again]))[0, 1].abs() < 0.03  # neighbours in the order


@pytest.mark.parametrize("recipe", ["m3i.demo", "rows.mim_pixel", "hvp.vit_b16"])
def test_any_division_of_a_batch_drops_the_same_branches(recipe):
    run = shrink(load(recipe))
    batch = random_batch(run, 16)
    batch = replace(batch, position=batch.position + 10**9)
    batch = batch.both_ways() if run.objective.input.views == 2 else batch
    keys = input_keys(run.objective.input, batch, run.seed)
    assert len(keys.unique()) == len(keys) == len(batch.mask)
    assert not set(keys.tolist()) & set(input_keys(run.objective.input, batch, run.seed + 1).tolist())
    whole = drawn(keys, 0.3, 0.5)
    for parts in (2, 4):
        rows = [drawn(part, 0.3, 0.5) for part in keys.chunk(parts)]
        assert torch.equal(torch.cat(rows, dim=1), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_with_keys_drops_branches_and_leaves_the_generator_alone(family):
    torch.manual_seed(0)
    encoder, images = tiny(family, 0.5), torch.rand(4, 3, 64, 64)
    keys, state = splitmix64(torch.arange(4)), torch.get_rng_state()
    first, again = encoder.features(images, keys), encoder.features(images, keys)
    assert torch.equal(first, again) and not torch.equal(first, encoder.eval().features(images, keys))
    assert torch.equal(state, torch.get_rng_state())
    half = encoder.train().features(images[2:], keys[2:])
    torch.testing.assert_close(half, first[2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_without_keys_draws_from_the_generator(family):
    torch.manual_seed(0)
    encoder, images = tiny(family, 0.5), torch.rand(4, 3, 64, 64)
    encoder.features(images, splitmix64(torch.arange(4)))  # of which nothing stays
    assert not torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"depth": 4}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 2, 2, 1)}),
        ("convnext_atto", {"depths": (1, 2, 2, 1)}),
    ],
)
def test_rates_that_are_set_later_are_those_that_timm_builds(name, arguments):
    built = timm.create_model(name, drop_path_rate=0.3, num_classes=0, **arguments)
    replace_timm(built)
    later = timm.create_model(name, num_classes=0, **arguments)
    assert set_linear(later, 0.3) > 2
    rates = [
        {
            where: m.probability
            for where, m in model.named_modules()
            if isinstance(m, DropPath) and m.probability
        }
        for model in (built, later)
    ]
    assert rates[1] == pytest.approx(rates[0]) and max(rates[0].values()) == pytest.approx(0.3)
    assert set_linear(nn.Linear(2, 2), 0.3) == 0


def test_rates_that_are_set_later_are_those_that_internimage_builds():
    built, later = tiny("internimage", 0.3), tiny("internimage", 0.0)
    assert set_linear(later, 0.3) > 2
    rates = [[m.probability for m in model.modules() if isinstance(m, DropPath)] for model in (built, later)]
    assert rates[1] == pytest.approx(rates[0]) and max(rates[0]) == pytest.approx(0.3)
