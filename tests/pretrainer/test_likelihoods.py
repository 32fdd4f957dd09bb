"""Do the likelihoods say what their formulas say?"""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.likelihoods import category_nats, gaussian_nats


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
