"""Do the likelihoods say what their formulas say?"""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.likelihoods import (
    DECORRELATION_WEIGHT,
    agreement_nats,
    bernoulli_nats,
    category_nats,
    code_nats,
    cosine_nats,
    decorrelation_nats,
    gaussian_nats,
    laplace_nats,
    mean_over_labelled,
    uniform_part,
)


def test_gaussian_scores_only_the_scored_positions():
    prediction, target = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    scored = torch.tensor([[True, False, True, False]] * 2)
    target[~scored] = 1e6
    assert gaussian_nats(prediction, target, scored).tolist() == [0.5, 0.5]


def test_gaussian_is_half_the_squared_error_per_dimension():
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    expected = sum(
        0.5 * float(p - t) ** 2 for p, t in zip(prediction.flatten(), target.flatten(), strict=True)
    )
    everything = torch.ones(3, 5, dtype=torch.bool)
    assert gaussian_nats(prediction, target, everything).mean().item() == pytest.approx(
        expected / 105, rel=1e-5
    )


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
    nats = mean_over_labelled(category_nats(torch.zeros(3, 24), labels, smoothing=0.1), labels >= 0)
    assert nats.item() == pytest.approx(math.log(24), rel=1e-6)


def test_category_averages_over_labelled_samples_only():
    logits = torch.tensor([[2.0, 0.0], [0.0, 50.0], [0.0, 0.0]])
    labels = torch.tensor([0, -1, 1])
    expected = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    nats = mean_over_labelled(category_nats(logits, labels, smoothing=0.0), labels >= 0)
    assert nats.item() == pytest.approx(expected)


def test_category_without_labels_is_zero_and_has_zero_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    none = torch.zeros(3, dtype=torch.bool)
    nats = mean_over_labelled(category_nats(logits, torch.full((3,), -1), smoothing=0.1), none)
    nats.backward()
    assert nats.item() == 0 and not logits.grad.any()


def test_code_is_the_cross_entropy_of_the_scored_positions():
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 9.0]], [[7.0, 7.0, 7.0], [0.0, 1.0, 0.0]]])
    codes, scored = torch.tensor([[0, 0], [2, 1]]), torch.tensor([[True, False], [False, True]])
    expected = (math.log(1 + 2 * math.exp(-2)) + math.log(1 + 2 * math.exp(-1))) / 2
    assert code_nats(logits, codes, scored).mean().item() == pytest.approx(expected)


def test_code_at_chance_is_log_of_the_codebook():
    everywhere = torch.ones(2, 5, dtype=torch.bool)
    nats = code_nats(torch.zeros(2, 5, 8192), torch.full((2, 5), 17, dtype=torch.int32), everywhere)
    assert nats.mean().item() == pytest.approx(math.log(8192), rel=1e-6)


def tag_inputs():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(12, 9, generator=generator) * 3
    is_positive = torch.rand(12, 9, generator=generator) > 0.7
    has_tags = torch.rand(12, generator=generator) > 0.3
    return logits, is_positive, has_tags


def plain_bernoulli(logits, is_positive, has_tags, positive_weight, positive_focus, negative_focus):
    """HVP-MTL's loss written out, one tag at a time, with the minus signs."""
    total = 0.0
    for i in range(len(logits)):
        for k in range(logits.shape[1]) if has_tags[i] else ():
            p = 1 / (1 + (-logits[i, k]).exp())
            if is_positive[i, k]:
                total = total - positive_weight * (1 - p) ** positive_focus * p.log()
            else:
                total = total - p**negative_focus * (1 - p).log()
    return total / has_tags.sum()


@pytest.mark.parametrize("weights", [(10.0, 4.0, 1.0), (1.0, 0.0, 0.0), (3.0, 0.5, 2.5)])
def test_bernoulli_equals_the_plain_formula(weights):
    logits, is_positive, has_tags = tag_inputs()
    wide, narrow = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected = plain_bernoulli(wide, is_positive, has_tags, *weights)
    found = mean_over_labelled(bernoulli_nats(narrow, is_positive, *weights), has_tags)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(found, narrow)[0], torch.autograd.grad(expected, wide)[0]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-7)


def test_bernoulli_without_weight_and_foci_is_the_negative_log_likelihood():
    logits, is_positive, has_tags = tag_inputs()
    likelihood = torch.distributions.Bernoulli(logits=logits.double()).log_prob(is_positive.double())
    found = mean_over_labelled(bernoulli_nats(logits, is_positive, 1.0, 0.0, 0.0), has_tags)
    assert found.item() == pytest.approx(-likelihood.sum(1)[has_tags].mean().item(), rel=1e-6)


def test_bernoulli_at_chance():
    """Three positives of eleven tags at p = 1/2: k ln 2, and with HVP-MTL's weights 10 / 2^4 and 1 / 2 of ln 2."""
    is_positive = torch.zeros(2, 11, dtype=torch.bool)
    is_positive[:, :3] = True
    plain = bernoulli_nats(torch.zeros(2, 11), is_positive, 1.0, 0.0, 0.0)
    assert plain.tolist() == pytest.approx([11 * math.log(2)] * 2, rel=1e-6)
    weighted = bernoulli_nats(torch.zeros(2, 11), is_positive, 10.0, 4.0, 1.0)
    assert weighted.tolist() == pytest.approx([(3 * 10 / 16 + 8 / 2) * math.log(2)] * 2, rel=1e-6)


def test_bernoulli_of_a_tag_ends_at_the_floor_with_finite_gradients():
    for logit, is_positive in ((-1e4, True), (1e4, False), (1e4, True), (-1e4, False)):
        logits = torch.tensor([[logit]], requires_grad=True)
        nats = bernoulli_nats(logits, torch.tensor([[is_positive]]), 10.0, 0.5, 0.5)
        nats.backward()
        is_wrong = is_positive == (logit < 0)
        expected = (10 if is_positive else 1) * math.log(1e8) if is_wrong else 0
        assert nats.item() == pytest.approx(expected, rel=1e-6)
        assert logits.grad.isfinite().all()


def test_bernoulli_without_tags_is_zero_and_has_zero_gradient():
    logits, is_positive, has_tags = tag_inputs()
    logits.requires_grad_()
    nats = mean_over_labelled(bernoulli_nats(logits, is_positive, 10.0, 4.0, 1.0), torch.zeros_like(has_tags))
    nats.backward()
    assert nats.item() == 0 and not logits.grad.any()


def test_agreement_is_the_mean_of_both_divergences():
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 4, 6, generator=generator) * 2
    teacher.requires_grad_()
    student.requires_grad_()
    s, t = student.detach().double().softmax(1), teacher.detach().double().softmax(1)
    forth, back = (s * (s / t).log()).sum(1).mean(), (t * (t / s).log()).sum(1).mean()
    nats = agreement_nats(student, teacher).mean()
    assert nats.item() == pytest.approx(((forth + back) / 2).item(), rel=1e-5)
    nats.backward()
    assert student.grad.any() and teacher.grad is None


def test_agreement_of_equals_is_zero_whatever_is_added_to_all_tags():
    similarities = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert agreement_nats(similarities, similarities).tolist() == [0, 0, 0]
    assert agreement_nats(similarities, similarities + 5).tolist() == pytest.approx([0] * 3, abs=1e-6)


def patch_inputs():
    generator = torch.Generator().manual_seed(6)
    return torch.randn(12, 4, 5, generator=generator) + 1, torch.randn(12, 4, 5, generator=generator) + 0.5


def test_uniform_part_is_the_mean_squared_product_with_all_targets():
    prediction, target = patch_inputs()
    wide, narrow = prediction.double().requires_grad_(), prediction.clone().requires_grad_()
    p, t = wide.flatten(0, 1), target.double().flatten(0, 1)
    expected = torch.stack([(row @ other) ** 2 for row in p for other in t]).mean() / 5
    found = uniform_part(narrow, target.requires_grad_()).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = (
        torch.autograd.grad(found, narrow, retain_graph=True)[0],
        torch.autograd.grad(expected, wide)[0],
    )
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-7)
    found.backward()
    assert target.grad is None


def test_uniform_part_of_strangers_is_one_and_of_a_collapse_the_width():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 100, 100, 8, generator=generator)
    assert uniform_part(prediction, target).mean().item() == pytest.approx(1, abs=0.05)
    assert uniform_part(torch.ones(2, 3, 8), torch.ones(2, 3, 8)).tolist() == pytest.approx([8, 8])
