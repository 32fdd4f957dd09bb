"""Is the chunked contrastive loss the plain one, on any number of ranks?"""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from pretrain.kernels import contrastive


def plain_nats(images, texts, has_text, scale):
    """CLIP's loss written out on the rows that have a text."""
    logits = scale * images[has_text] @ texts[has_text].T
    diagonal = torch.arange(len(logits))
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def inputs(rows: int, width: int = 8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(rows, width, generator=generator, dtype=dtype) for _ in range(2))
    has_text = torch.rand(rows, generator=generator) > 0.3
    return images, texts, has_text, torch.tensor(3.0, dtype=dtype)


def loss_and_gradients(function, images, texts, has_text, scale):
    leaves = [t.clone().requires_grad_() for t in (images, texts, scale)]
    units = [F.normalize(leaf, dim=1) for leaf in leaves[:2]]
    loss = function(*units, has_text, leaves[2])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_equals_the_plain_formula_in_any_chunk_size(monkeypatch):
    expected = loss_and_gradients(plain_nats, *inputs(17))
    for chunk in (1, 5, 64):
        monkeypatch.setattr(contrastive, "CHUNK", chunk)
        got = loss_and_gradients(contrastive.contrastive_nats, *inputs(17))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_is_log_n_when_all_embeddings_are_equal():
    rows = torch.ones(11, 4, dtype=torch.float64) / 2
    nats = contrastive.contrastive_nats(
        rows, rows, torch.ones(11, dtype=torch.bool), torch.tensor(7.0, dtype=torch.float64)
    )
    assert nats.item() == pytest.approx(math.log(11))


def test_without_any_text_loss_and_gradients_are_zero():
    images, texts, has_text, scale = inputs(6)
    got = loss_and_gradients(contrastive.contrastive_nats, images, texts, torch.zeros_like(has_text), scale)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in got)


def _rank_gradients(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    images, texts, has_text, scale = inputs(12)
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
    got = loss_and_gradients(contrastive.contrastive_nats, images[mine], texts[mine], has_text[mine], scale)
    torch.save(got, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_together_equal_one_rank(tmp_path, free_port):
    world = 2
    mp.spawn(_rank_gradients, (world, free_port, str(tmp_path)), nprocs=world)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    loss, images, texts, scale = loss_and_gradients(plain_nats, *inputs(12))
    # The trainer averages losses and parameter gradients over ranks; features belong to one rank each.
    torch.testing.assert_close(sum(p[0] for p in parts) / world, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]) / world, images, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]) / world, texts, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(sum(p[3] for p in parts) / world, scale, rtol=1e-10, atol=1e-14)


def test_features_that_are_not_finite_are_not_hidden():
    images, texts, has_text, scale = inputs(6)
    has_text[:] = True
    texts[4] = torch.nan
    assert contrastive._log_sum_exp(images, texts, has_text, scale).isnan().all()
    assert contrastive.contrastive_nats(images, texts, has_text, scale).isnan()
