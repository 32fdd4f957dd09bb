"""Do the likelihoods say what their formulas say?"""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.likelihoods import (
    DECORRELATION_WEIGHT,
    category_nats,
    cosine_nats,
    decorrelation_nats,
    gaussian_nats,
    laplace_nats,
)


def test_gaussian_scores_only_the_scored_positions():
    prediction, target = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    scored = torch.tensor([[True, False, True, False]] * 2)
    target[~scored] = 1e6
    assert gaussian_nats(prediction, target, scored).item() == 0.5


def test_gaussian_is_half_the_squared_error_per_dimension():
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    expected = sum(
        0.5 * float(p - t) ** 2 for p, t in zip(prediction.flatten(), target.flatten(), strict=True)
    )
    everything = torch.ones(3, 5, dtype=torch.bool)
    assert gaussian_nats(prediction, target, everything).item() == pytest.approx(expected / 105, rel=1e-5)


def test_laplace_is_the_absolute_error_per_dimension():
    prediction, target = torch.tensor([[[1.0, -2.0], [0.0, 9.0]]]), torch.zeros(1, 2, 2)
    scored = torch.tensor([[True, False]])
    assert laplace_nats(prediction, target, scored).item() == pytest.approx(1.5)
    uniform = torch.rand(1, 20000, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    everything = torch.ones(1, 20000, dtype=torch.bool)
    assert laplace_nats(torch.zeros_like(uniform), uniform, everything).item() == pytest.approx(0.5, abs=0.01)


def test_cosine_is_zero_along_one_across_and_two_against():
    prediction = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]])
    target = torch.tensor([[[1.0, 0.0]] * 3])
    for place, nats in enumerate((0.0, 1.0, 2.0)):
        scored = torch.arange(3)[None] == place
        assert cosine_nats(prediction, target, scored).item() == pytest.approx(nats, abs=1e-6)


def plain_decorrelation(prediction, target):
    """Barlow Twins written out: standardised over the batch, one entry of the correlation at a time."""
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (prediction, target))
    width, total = a.shape[1], 0.0
    for i in range(width):
        for j in range(width):
            correlation = (a[:, i] * b[:, j]).mean()
            total = total + ((1 - correlation) ** 2 if i == j else DECORRELATION_WEIGHT * correlation**2)
    return total / width


def decorrelation_inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 5, generator=generator) * 2 + 1, torch.randn(12, 5, generator=generator)


def test_decorrelation_equals_the_plain_formula():
    prediction, target = decorrelation_inputs()
    wide = prediction.double().requires_grad_()
    expected = plain_decorrelation(wide, target.double())
    narrow = prediction.clone().requires_grad_()
    found = decorrelation_nats(narrow, target)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(found, narrow)[0], torch.autograd.grad(expected, wide)[0]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-7)


def test_decorrelation_of_strangers_is_about_one_and_of_equals_about_zero():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20000, 4, generator=generator)
    assert decorrelation_nats(a, b).item() == pytest.approx(1, abs=0.05)
    assert decorrelation_nats(a, a).item() == pytest.approx(0, abs=1e-3)


def test_category_at_chance_is_log_of_the_number_of_classes():
    labels = torch.tensor([3, -1, 0])
    nats = category_nats(torch.zeros(3, 24), labels, labels >= 0, smoothing=0.1)
    assert nats.item() == pytest.approx(math.log(24), rel=1e-6)


def test_category_averages_over_labelled_samples_only():
    logits = torch.tensor([[2.0, 0.0], [0.0, 50.0], [0.0, 0.0]])
    labels = torch.tensor([0, -1, 1])
    expected = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    assert category_nats(logits, labels, labels >= 0, smoothing=0.0).item() == pytest.approx(expected)


def test_category_without_labels_is_zero_and_has_zero_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    none = torch.zeros(3, dtype=torch.bool)
    nats = category_nats(logits, torch.full((3,), -1), none, smoothing=0.1)
    nats.backward()
    assert nats.item() == 0 and not logits.grad.any()
