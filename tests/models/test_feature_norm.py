"""Is FeatureNorm batch normalisation over all ranks, and can the layer before it take it over?"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pretrain.config import Backbone
from pretrain.facts import DataFacts
from pretrain.models.backbone import BACKBONES, build_encoder
from pretrain.models.feature_norm import MOMENTUM, FeatureNorm
from pretrain.recipes import load
from pretrain.towers import Towers
from tests.engine.launch import together
from tests.fakes import shrink

WIDTH = 6


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = 20 + 3 * torch.randn(4, 5, WIDTH, generator=generator)
    return tokens, torch.randn(4, 5, WIDTH, generator=generator)


def normed(tokens: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    norm, leaf = FeatureNorm(WIDTH), tokens.clone().requires_grad_()
    out = norm(leaf)
    (out * weights).sum().backward()
    return [out.detach(), leaf.grad, norm.mean, norm.variance]


def test_equals_torch_batch_norm_in_outputs_and_gradients():
    tokens, weights = inputs()
    out, gradient, mean, _ = normed(tokens, weights)
    leaf = tokens.clone().requires_grad_()
    expected = F.batch_norm(leaf.flatten(0, 1), None, None, training=True).view_as(leaf)
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean, MOMENTUM * tokens.mean((0, 1)))


def test_a_batch_that_is_not_finite_leaves_the_statistics_alone():
    norm, (tokens, _) = FeatureNorm(WIDTH), inputs()
    norm(tokens)
    before = norm.mean.clone(), norm.variance.clone()
    broken = tokens.clone()
    broken[0, 0, 2] = float("inf")
    norm(broken)
    assert torch.equal(norm.mean[2], before[0][2]) and torch.equal(norm.variance[2], before[1][2])
    assert norm(tokens).isfinite().all()


def _on_rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mine = slice(rank * 2, rank * 2 + 2)
    tokens, weights = inputs()
    torch.save(normed(tokens[mine], weights[mine]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_together_equal_one_rank(tmp_path, free_port):
    together(_on_rank, 2, free_port, str(tmp_path), world=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    out, gradient, mean, variance = normed(*inputs())
    for index, expected in ((0, out), (1, gradient)):
        got = torch.cat([part[index] for part in parts])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(part[2:], [mean, variance], rtol=1e-5, atol=1e-6)


def test_statistics_stay_float32_in_a_bfloat16_module():
    norm = FeatureNorm(WIDTH)
    norm.mean.fill_(1.2345678)  # no number of bfloat16
    norm = torch.nn.Sequential(norm).bfloat16()[0]
    assert norm.mean.eq(1.2345678).all()
    out = norm(inputs()[0].bfloat16())
    assert (norm.mean.dtype, out.dtype) == (torch.float32, torch.bfloat16)


def test_folded_towers_embed_alike_and_have_the_plain_keys():
    run = shrink(load("m3i.demo"))
    facts = DataFacts(("a", "b"), 0)
    torch.manual_seed(0)
    towers = Towers(run, facts)
    images = torch.randn(3, 3, run.views.size, run.views.size)
    for _ in range(20):
        towers.embed_tokens(towers.encoder(images))
    towers.eval()
    expected = towers.embed_tokens(towers.encoder(images)).detach()
    towers.fold_norms()
    torch.testing.assert_close(towers.embed_tokens(towers.encoder(images)), expected, rtol=1e-4, atol=1e-4)
    plain = replace(
        run, backbone=replace(run.backbone, token_norm="none"), pool=replace(run.pool, norm="none")
    )
    assert towers.state_dict().keys() == Towers(plain, facts).state_dict().keys()


@pytest.mark.parametrize("family", BACKBONES)
def test_folded_encoder_gives_the_same_tokens_and_has_the_plain_keys(family):
    backbone = Backbone(family, f"{family}_tiny", drop_path=0.0, token_width=64, token_norm="batch")
    torch.manual_seed(0)
    encoder = build_encoder(backbone, 64)
    images = torch.randn(3, 3, 64, 64)
    for _ in range(20):
        encoder(images)
    encoder.eval()
    expected = encoder(images, summary=True).detach()
    encoder.fold_norm()
    torch.testing.assert_close(encoder(images, summary=True), expected, rtol=1e-4, atol=1e-4)
    plain = replace(backbone, token_norm="none")
    assert encoder.state_dict().keys() == build_encoder(plain, 64).state_dict().keys()
