"""Does the weight of the label losses follow the two gradient norms, and nothing else?"""

from __future__ import annotations

import json

import pytest
import torch

from pretrain.balance import BalanceTracker, fork


def _step(tracker: BalanceTracker, image: float, label: float) -> None:
    """One step whose branches send gradients of these norms to a feature (the label's times the weight)."""
    feature = torch.zeros(4, requires_grad=True)
    for_images, for_labels = fork(feature, tracker)
    loss = image * for_images[0] + tracker.weight * label * for_labels[1]
    loss.backward()
    tracker.advance()


def test_fork_sees_the_norms_of_separate_backward_passes() -> None:
    torch.manual_seed(0)
    features = torch.randn(6, 5, 8, requires_grad=True)
    images, labels = torch.nn.Linear(8, 3), torch.nn.Linear(8, 2)
    tracker = BalanceTracker()
    for_images, for_labels = fork(features, tracker)
    image_loss, label_loss = images(for_images).square().mean(), labels(for_labels).exp().mean()
    (gradient,) = torch.autograd.grad(image_loss + label_loss, features)
    tracker.advance()
    plain_image, plain_label = images(features).square().mean(), labels(features).exp().mean()
    (image,) = torch.autograd.grad(plain_image, features, retain_graph=True)
    (label,) = torch.autograd.grad(plain_label, features)
    torch.testing.assert_close(gradient, image + label)
    torch.testing.assert_close(tracker.image_norm, image.norm())
    torch.testing.assert_close(tracker.label_norm, label.norm())


def test_weight_is_the_ratio_of_corrected_averages_of_earlier_steps() -> None:
    tracker = BalanceTracker(gamma=2.0, decay=0.9)
    assert tracker.weight == 1
    _step(tracker, image=3.0, label=4.0)
    assert tracker.weight == pytest.approx(2 * 3 / 4)  # the correction makes the first step count fully
    _step(tracker, image=5.0, label=1.0)
    assert tracker.label_norm == pytest.approx(1.0)  # the weight of the step is divided out
    average = {"image": 0.09 * 3 + 0.1 * 5, "label": 0.09 * 4 + 0.1 * 1}
    assert tracker.weight == pytest.approx(2 * average["image"] / average["label"])


def test_a_branch_without_gradient_leaves_its_average() -> None:
    tracker = BalanceTracker(decay=0.5)
    _step(tracker, image=3.0, label=4.0)
    _step(tracker, image=3.0, label=0.0)  # a batch without labels: zeros
    feature = torch.zeros(4, requires_grad=True)
    for_images, _ = fork(feature, tracker)  # a branch that nothing uses: None
    (3 * for_images[0]).backward()
    tracker.advance()
    assert tracker.weight == pytest.approx(3 / 4)
    torch.testing.assert_close(feature.grad, torch.tensor([3.0, 0, 0, 0]))


def test_a_gradient_that_is_not_finite_leaves_the_weight() -> None:
    tracker = BalanceTracker()
    _step(tracker, image=3.0, label=4.0)
    _step(tracker, image=float("inf"), label=float("nan"))
    assert tracker.weight == pytest.approx(3 / 4)


def test_micro_batches_add_up_to_one_step() -> None:
    tracker = BalanceTracker()
    for _ in range(2):
        for_images, for_labels = fork(torch.zeros(4, requires_grad=True), tracker)
        (3 * for_images[0] + 4 * for_labels[1]).backward()
    tracker.advance()
    assert tracker.image_norm == pytest.approx(3 * 2**0.5)


def test_fork_is_the_identity_without_gradient() -> None:
    tracker = BalanceTracker()
    with torch.no_grad():
        outputs = fork(torch.arange(3.0), tracker)
    tracker.advance()
    assert all(torch.equal(output, torch.arange(3.0)) for output in outputs)
    assert tracker.weight == 1


def test_norms_of_bfloat16_gradients_are_summed_in_float32() -> None:
    tracker = BalanceTracker()
    feature = torch.zeros(70_000, dtype=torch.bfloat16, requires_grad=True)
    for_images, _ = fork(feature, tracker)
    for_images.float().sum().backward()  # 70,000 ones: a bfloat16 sum stops at 256
    tracker.advance()
    assert tracker.image_norm == pytest.approx(70_000**0.5)


def test_state_survives_json_exactly() -> None:
    tracker, resumed = BalanceTracker(decay=0.9), BalanceTracker(decay=0.9)
    _step(tracker, image=3.1, label=0.7)
    resumed.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    for each in (tracker, resumed):
        _step(each, image=0.3, label=1.9)
    assert torch.equal(tracker.weight, resumed.weight)
