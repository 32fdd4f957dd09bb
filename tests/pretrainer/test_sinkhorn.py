"""Are codes and the loss of clusters what their formulas say?"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.config import Clusters
from pretrain.kernels.sinkhorn import cluster_nats, sinkhorn_codes
from pretrain.models.prototypes import Prototypes

CLUSTERS = Clusters(prototypes=6, width=8)


def codes_of(similarities, clusters=CLUSTERS):
    return sinkhorn_codes(similarities, clusters.epsilon, clusters.iterations, clusters.max_exponent)


def cluster_inputs():
    """Projected features of two views of twelve images, float32."""
    return torch.randn(2, 12, CLUSTERS.width, generator=torch.Generator().manual_seed(7))


def prototypes():
    torch.manual_seed(8)
    return Prototypes(CLUSTERS.width, CLUSTERS.prototypes)


def plain_codes(similarities, clusters=CLUSTERS):
    """SwAV's listing with all its constants, samples in columns, float64."""
    q = (similarities.double().T / clusters.epsilon).clamp(max=clusters.max_exponent).exp()
    num_prototypes, num_samples = q.shape
    q = q / q.sum()
    for _ in range(clusters.iterations):
        q = q / q.sum(dim=1, keepdim=True) / num_prototypes
        q = q / q.sum(dim=0, keepdim=True) / num_samples
    return (q * num_samples).T


def swapped(module, views):
    """Codes of both views, the swapped loss, and its gradients by features and prototypes."""
    leaf = views.clone().requires_grad_()
    scores = [module(view) for view in leaf]
    codes = [codes_of(score) for score in scores]
    loss = sum(cluster_nats(scores[i], codes[1 - i], CLUSTERS.temperature).mean() for i in (0, 1))
    gradients = torch.autograd.grad(loss, [leaf, module.weight])
    return [loss.detach(), gradients[0].transpose(0, 1), gradients[1], torch.stack(codes, dim=1)]


@pytest.mark.parametrize("max_exponent", [10.0, 1000.0])
def test_codes_equal_plain_sinkhorn_in_float64(max_exponent):
    clusters = Clusters(max_exponent=max_exponent)
    similarities = prototypes()(cluster_inputs()[0]).detach()
    found = codes_of(similarities, clusters)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain_codes(similarities, clusters), rtol=1e-5, atol=1e-7)


def test_exponents_above_the_limit_count_as_the_limit():
    similarities = torch.tensor([[0.5, 0.9, -1.0], [0.1, -0.2, 0.6]])  # 0.5 / 0.05 = 10 is the limit
    cut = torch.tensor([[0.5, 0.5, -1.0], [0.1, -0.2, 0.5]])
    torch.testing.assert_close(codes_of(similarities), codes_of(cut))


def test_codes_of_many_iterations_use_all_prototypes_alike():
    codes = codes_of(prototypes()(cluster_inputs()[0]), Clusters(iterations=200))
    torch.testing.assert_close(codes.sum(1), torch.ones(12))
    torch.testing.assert_close(codes.sum(0), torch.full((6,), 12 / 6), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4, 1e30])
def test_similarities_of_any_size_give_codes_that_sum_to_one(size):
    similarities = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * size
    similarities[0], similarities[1] = -size, size  # far from all prototypes, near to all
    codes = codes_of(similarities)
    assert codes.isfinite().all() and (codes > 0).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(9))


def test_collapse_of_all_samples_to_one_feature_gives_equal_shares():
    scores = prototypes()(torch.ones(64, CLUSTERS.width))
    codes = codes_of(scores)
    torch.testing.assert_close(codes, torch.full((64, 6), 1 / 6))
    assert cluster_nats(scores, codes, CLUSTERS.temperature).isfinite().all()


def test_no_gradient_reaches_the_codes():
    module = prototypes()
    scores = module(cluster_inputs()[0])
    assert scores.requires_grad and not codes_of(scores).requires_grad


def test_codes_leave_the_similarities_as_they_were():
    similarities = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    before = similarities.clone()
    codes_of(similarities)
    assert torch.equal(similarities, before)


def test_cluster_is_the_cross_entropy_with_the_codes():
    generator = torch.Generator().manual_seed(9)
    scores, codes = torch.randn(2, 5, 4, generator=generator)
    codes = codes.softmax(1)
    narrow, wide = scores.clone().requires_grad_(), scores.double().requires_grad_()
    exponentials = (wide / 0.1).exp()
    shares = exponentials / exponentials.sum(1, keepdim=True)
    expected = -sum(codes[i, k].double() * shares[i, k].log() for i in range(5) for k in range(4)) / 5
    found = cluster_nats(narrow, codes, 0.1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(found, narrow)[0], torch.autograd.grad(expected, wide)[0]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-6)


def test_cluster_at_chance_is_log_of_the_number_of_prototypes():
    codes = torch.rand(3, 3000, generator=torch.Generator().manual_seed(0))
    codes /= codes.sum(1, keepdim=True)
    assert cluster_nats(torch.full((3, 3000), 0.3), codes, 0.1).mean().item() == pytest.approx(math.log(3000))


def test_scores_are_cosines_in_float32_whatever_the_lengths():
    module, features = prototypes(), cluster_inputs()[0]
    expected = F.cosine_similarity(features[:, None], module.weight[None], dim=-1)
    torch.testing.assert_close(module(features), expected)
    with torch.no_grad():
        module.weight *= 5
    torch.testing.assert_close(module(3 * features), expected)
    assert module.bfloat16()(features.bfloat16()).dtype == torch.float32
