"""Is the chunked contrastive loss the plain one?"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.kernels import contrastive


def plain_nats(images, texts, has_text, scale, ids=None):
    """CLIP's loss written out on the rows that have a text; rows of equal `ids` are no negatives of each other."""
    logits = scale * images[has_text] @ texts[has_text].T
    diagonal = torch.arange(len(logits))
    if ids is not None:
        is_other = ~torch.eye(len(logits), dtype=torch.bool)
        logits = logits.masked_fill((ids[has_text][:, None] == ids[has_text]) & is_other, -torch.inf)
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def chunked_nats(*inputs):
    return contrastive.contrastive_nats(*inputs)[0]


def chunked_matching(*inputs):
    return contrastive.matching_nats(*inputs).mean()


def inputs(rows: int, width: int = 8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(rows, width, generator=generator, dtype=dtype) for _ in range(2))
    has_text = torch.rand(rows, generator=generator) > 0.3
    return images, texts, has_text, torch.tensor(3.0, dtype=dtype)


def loss_and_gradients(function, images, texts, has_text, scale, *ids):
    leaves = [t.clone().requires_grad_() for t in (images, texts, scale)]
    units = [F.normalize(leaf, dim=1) for leaf in leaves[:2]]
    loss = function(*units, has_text, leaves[2], *ids)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_equals_the_plain_formula_in_any_chunk_size(monkeypatch):
    expected = loss_and_gradients(plain_nats, *inputs(17))
    for rows in (1, 5, 64):
        monkeypatch.setattr(contrastive, "LOGITS", 17 * rows)
        got = loss_and_gradients(chunked_nats, *inputs(17))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def repeated(rows: int):
    """Numbers of texts of which some stand several times, on every rank and across ranks."""
    return torch.arange(rows) % 5


def test_equal_texts_are_no_negatives_of_each_other(monkeypatch):
    expected = loss_and_gradients(plain_nats, *inputs(17), repeated(17))
    assert expected[0] != plain_nats(*(F.normalize(t, dim=1) for t in inputs(17)[:2]), *inputs(17)[2:])
    for rows in (1, 5, 64):
        monkeypatch.setattr(contrastive, "LOGITS", 17 * rows)
        got = loss_and_gradients(chunked_nats, *inputs(17), repeated(17))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_texts_have_one_number_where_all_their_tokens_are_equal():
    tokens = torch.randint(30_000, (2000, 16), generator=torch.Generator().manual_seed(0))
    tokens[1000:] = tokens[:1000]
    tokens[1500:, 15] += 1
    tokens[1250:1500, [3, 4]] = tokens[1250:1500, [4, 3]]
    ids = contrastive.text_ids(tokens)
    _, expected = torch.unique(tokens, dim=0, return_inverse=True)
    assert torch.equal(ids[:, None] == ids, expected[:, None] == expected)


def test_texts_of_one_token_have_the_published_numbers_of_splitmix64():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of seed 0
    assert [number % 2**64 for number in contrastive.text_ids(torch.arange(3)[:, None]).tolist()] == published


def test_numbers_of_texts_are_as_apart_as_random_ones():
    texts = torch.cartesian_prod(*[torch.arange(2)] * 16)  # 65,536, each but a few tokens from many others
    ids = contrastive.text_ids(texts)
    halves = torch.stack([ids & (2**32 - 1), (ids >> 32) & (2**32 - 1)])
    # of random halves half a pair is expected to be equal, 2^31 pairs over 2^32 numbers: more than 5 are none
    assert all(len(half.unique()) >= len(texts) - 5 for half in halves)


class Devices(TorchDispatchMode):
    """Collects where the outcomes of all operations lie."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.seen.add(out.device.type)
        return out


def test_numbers_of_texts_are_computed_where_the_tokens_lie():
    tokens = torch.ones(4, 7, dtype=torch.int64, device="meta")
    with Devices() as devices:
        ids = contrastive.text_ids(tokens)
    assert devices.seen == {"meta"} and ids.shape == (4,) and ids.dtype == torch.int64


def test_is_log_n_when_all_embeddings_are_equal():
    rows = torch.ones(11, 4, dtype=torch.float64) / 2
    nats = chunked_nats(rows, rows, torch.ones(11, dtype=torch.bool), torch.tensor(7.0, dtype=torch.float64))
    assert nats.item() == pytest.approx(math.log(11))


def test_without_any_text_loss_and_gradients_are_zero():
    images, texts, has_text, scale = inputs(6)
    got = loss_and_gradients(chunked_nats, images, texts, torch.zeros_like(has_text), scale)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in got)


def plain_matching(predictions, targets, scale):
    """One direction of InfoNCE written out."""
    logits = scale * predictions @ targets.detach().T
    return F.cross_entropy(logits, torch.arange(len(logits)))


def matching_gradients(function, predictions, targets):
    leaf = predictions.clone().requires_grad_()
    loss = function(F.normalize(leaf, dim=1), F.normalize(targets, dim=1), 5.0)
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


def test_matching_equals_the_plain_formula_in_any_chunk_size(monkeypatch):
    predictions, targets, *_ = inputs(17)
    expected = matching_gradients(plain_matching, predictions, targets)
    for rows in (1, 5, 64):
        monkeypatch.setattr(contrastive, "LOGITS", 17 * rows)
        got = matching_gradients(chunked_matching, predictions, targets)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_no_gradient_reaches_the_targets_of_a_matching():
    predictions, targets, *_ = inputs(5)
    targets.requires_grad_()
    chunked_matching(predictions.requires_grad_(), targets, 2.0).backward()
    assert predictions.grad is not None and targets.grad is None


def test_features_that_are_not_finite_are_not_hidden():
    images, texts, has_text, scale = inputs(6)
    has_text[:] = True
    texts[4] = torch.nan
    pairs = contrastive._Pairs(has_text, torch.arange(6), 0)
    assert contrastive._log_sum_exp(images, texts, pairs, scale).isnan().all()
    assert chunked_nats(images, texts, has_text, scale).isnan()
