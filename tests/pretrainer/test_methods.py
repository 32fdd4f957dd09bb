"""Are MVP, HVP-MTL and the target encoders what their papers say, written out plainly?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pretrain.balance import BalanceTracker
from pretrain.data.mask import num_hidden
from pretrain.models.pixels import normalise
from pretrain.objective import Input, Objective, Target
from pretrain.recipes import load
from pretrain.targets import TargetEncoders, positives
from tests.fakes import FACTS, random_batch, shrink
from tests.pretrainer.test_pretrainer import build, tiny_run
from tests.stand_ins import StandInGuide, encoders


def nats_of(model, batch, said) -> dict[str, float]:
    return {name: value.item() for name, value in model(batch, said, BalanceTracker()).nats.items()}


def watched(model, part: str):
    """Every output of a sub-module of the student during a forward pass."""
    seen = []
    model.get_submodule(part).register_forward_hook(lambda module, inputs, out: seen.append(out))
    return seen


def masked_tokens(model, batch):
    """Summary and tokens of the masked views, encoded anew."""
    images = normalise(batch.views[:, 0], model.run.views.mean, model.run.views.std, torch.float32)
    patch = model.run.mask.patch
    hidden = batch.mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    return model.student.encoder(model.mask_patch(images, hidden), summary=True)


def test_mvp_is_one_minus_the_mean_cosine_over_class_and_patches():
    run = tiny_run("mvp.vit_b16")
    model, teacher = build(run)
    batch, guide = random_batch(run, 4), StandInGuide()
    predicted = model.linear["guide"](masked_tokens(model, batch)).double()
    wanted = guide(batch.views[:, 0], run.grid).double()
    cosines = (predicted * wanted).sum(-1) / predicted.norm(dim=-1) / wanted.norm(dim=-1)
    assert cosines.shape == (4, 1 + 16)
    assert nats_of(model, batch, encoders(teacher))["dense"] == pytest.approx(
        1 - cosines.mean().item(), abs=1e-5
    )


def test_mvp_hides_exactly_75_of_196_patches_and_reads_the_guides_own_pixels():
    run = load("mvp.vit_b16")
    assert (run.grid, num_hidden(run.grid, run.mask.ratio)) == (14, 75)
    asked = []

    class Asked(StandInGuide):
        def forward(self, views, grid):
            asked.append((views, grid))
            return super().forward(views, grid)

    small = tiny_run("mvp.vit_b16")
    model, teacher = build(small)
    batch = random_batch(small, 4)
    model(batch, TargetEncoders(teacher, Asked()), BalanceTracker())
    ((views, grid),) = asked
    assert torch.equal(views, batch.views[:, 0]) and grid == 4  # whole, unmasked, as uint8


def test_the_mask_token_of_a_vit_is_one_vector_wherever_it_stands():
    run = tiny_run("mvp.vit_b16")
    model, teacher = build(run)
    batch = random_batch(run, 4)
    seen = watched(model, "student.encoder.vit.patch_embed")
    model(batch, encoders(teacher), BalanceTracker())
    embedded, hidden = seen[0].reshape(4, 16, -1), batch.mask.flatten(1)
    token = embedded[hidden][0]
    torch.testing.assert_close(embedded[hidden], token.expand(int(hidden.sum()), -1), rtol=1e-5, atol=1e-6)
    assert not torch.isclose(embedded[~hidden], token).all(dim=-1).any()
    with torch.no_grad():
        model.mask_patch.pixels += 1.0
    model(batch, encoders(teacher), BalanceTracker())
    assert not torch.allclose(seen[1].reshape(4, 16, -1)[hidden][0], token)


def test_codes_of_a_tokenizer_are_predicted_at_hidden_patches_by_cross_entropy():
    run = tiny_run("rows.mim_feature_tokenizer")
    model, teacher = build(run)
    batch, seen = random_batch(run, 4), []
    model.decoder.register_forward_hook(lambda module, inputs, out: seen.append(out))
    found = nats_of(model, batch, encoders(teacher))["dense"]
    hidden = batch.mask.flatten(1)
    codes = StandInGuide().codes(batch.views[:, 0], run.grid)
    assert found == pytest.approx(F.cross_entropy(seen[0].double()[hidden], codes[hidden]).item(), abs=1e-5)


def test_features_of_a_frozen_encoder_are_standardised_targets_of_hidden_patches():
    run = tiny_run("rows.mim_feature_frozen")
    model, teacher = build(run)
    batch, seen = random_batch(run, 4), []
    model.decoder.register_forward_hook(lambda module, inputs, out: seen.append(out))
    found = nats_of(model, batch, encoders(teacher))["dense"]
    z_y = StandInGuide()(batch.views[:, 0], run.grid)[:, 1:].double()
    z_y = (z_y - z_y.mean(-1, keepdim=True)) / (z_y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    hidden = batch.mask.flatten(1)
    assert found == pytest.approx(((seen[0].double() - z_y)[hidden] ** 2).mean().item() / 2, rel=1e-4)


def test_uniformity_adds_half_its_weight_of_what_predictions_share_with_all_targets():
    run = tiny_run("rows.siamese_feature")
    (target,) = run.objective.targets.values()
    model, teacher = build(run)
    batch, seen = random_batch(run, 4), []
    model.decoder.register_forward_hook(lambda module, inputs, out: seen.append(out.double()))
    plain = nats_of(model, batch, encoders(teacher))["dense"]
    model.targets = {"dense": replace(target, uniformity=0.3)}
    found = nats_of(model, batch, encoders(teacher))["dense"]
    images = normalise(batch.views[:, 1], run.views.mean, run.views.std, torch.float32)
    z_y = F.layer_norm(teacher.encoder(images).double(), (48,), eps=1e-6).flatten(0, 1)
    second = z_y.T @ z_y / len(z_y)
    shared = torch.einsum("nld,de,nle->nl", seen[0], second, seen[0]).mean() / 48
    assert found - plain == pytest.approx(0.5 * 0.3 * shared.item(), rel=1e-3)


@pytest.fixture(scope="module")
def hvp():
    """A small HVP-MTL step: (model, teacher, batch, batch of both views, nats)."""
    run = tiny_run("hvp.vit_b16")
    model, teacher = build(run)
    batch = random_batch(run, 4)
    return model, teacher, batch, batch.both_ways(), nats_of(model, batch, encoders(teacher))


def hvp_tokens(model, both):
    return masked_tokens(model, both)[:, 1:]


def owned_of(model, both):
    factor = model.grid // model.run.grid
    return ~both.mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1)


def test_hvp_tags_are_scored_by_the_weighted_asymmetric_loss_of_both_views(hvp):
    model, _, batch, both, nats = hvp
    logits, _ = model.student.tags(hvp_tokens(model, both), owned_of(model, both), model.grid)
    p = logits.double().sigmoid()
    has = positives(batch.tags, len(FACTS.tags)).repeat_interleave(2, dim=0)
    tags = model.run.tags
    assert (tags.positive_weight, tags.positive_focus, tags.negative_focus) == (10.0, 4.0, 1.0)
    plain = torch.where(has, -10 * (1 - p) ** 4 * p.log(), -p * (1 - p).log())
    assert nats["tags"] == pytest.approx(plain.sum(dim=1).mean().item(), rel=1e-5)


def test_hvp_clusters_of_each_view_are_those_of_the_other(hvp):
    model, _, _, both, nats = hvp
    student, clusters = model.student, model.run.clusters
    embedding = student.embed_tokens(hvp_tokens(model, both), owned_of(model, both))
    scores = student.prototypes(student.cluster_projector(embedding)).double()

    def codes(of_view):
        q = (of_view / clusters.epsilon).clamp(max=clusters.max_exponent).exp()
        for _ in range(clusters.iterations):
            q = q / q.sum(dim=0) / q.shape[1]
            q = q / q.sum(dim=1, keepdim=True) / len(q)
        return q * len(q)

    log = (scores / clusters.temperature).log_softmax(dim=-1)
    plain = -(codes(scores[1::2]) * log[0::2]).sum(1).mean() - (codes(scores[0::2]) * log[1::2]).sum(1).mean()
    assert 2 * nats["clusters"] == pytest.approx(plain.item(), rel=1e-4)


def test_hvp_pixels_are_the_distance_to_hidden_pixels_as_the_encoder_would_see_them(hvp):
    model, _, _, both, nats = hvp
    run, patch = model.run, model.run.views.size // model.grid
    predicted = model.linear["pixels"](hvp_tokens(model, both))
    side = model.grid
    drawn = (
        predicted.view(-1, side, side, 3, patch, patch).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    )
    images = normalise(both.views[:, 0], run.views.mean, run.views.std, torch.float32)
    squares = both.mask.repeat_interleave(run.mask.patch, 1).repeat_interleave(run.mask.patch, 2)
    hidden = squares[:, None].expand_as(images)
    assert run.mask.patch == 2 * patch  # squares of 32 pixels, tokens of 16
    assert nats["pixels"] == pytest.approx((drawn - images)[hidden].abs().mean().item(), rel=1e-5)


def test_hvp_momentum_is_the_symmetric_divergence_from_the_teacher_of_whole_views(hvp):
    model, teacher, _, both, nats = hvp
    _, student = model.student.tags(hvp_tokens(model, both), owned_of(model, both), model.grid)
    images = normalise(both.views[:, 0], model.run.views.mean, model.run.views.std, torch.float32)
    _, wanted = teacher.tags(teacher.encoder(images), None, model.grid)
    p, q = (s.double().softmax(dim=-1) for s in (student, wanted))
    plain = ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)).mean() / 2
    assert nats["tags_momentum"] == pytest.approx(plain.item(), rel=1e-4)


def test_tags_at_even_odds_cost_what_chance_costs(hvp):
    model, teacher, batch, _, _ = hvp
    weights = [p for name, p in model.student.tags.named_parameters() if p.shape in ((6, 32), (6,))]
    kept = [w.detach().clone() for w in weights]
    for weight in weights:
        weight.data.zero_()
    found = nats_of(model, batch, encoders(teacher))["tags"]
    for weight, old in zip(weights, kept, strict=True):
        weight.data.copy_(old)
    has = positives(batch.tags, len(FACTS.tags)).sum(dim=1).double()
    plain = ((10 * 0.5**4 * has + 0.5 * (len(FACTS.tags) - has)) * math.log(2)).mean()
    assert found == pytest.approx(plain.item(), rel=1e-5)


def test_a_view_that_several_targets_share_is_encoded_once():
    dense = Target("dense", "gaussian", "other", "ema", "stop_gradient")
    whole = Target("global", "gaussian", "other", "ema", "stop_gradient")
    same = Target("dense", "cosine", "same", "ema", "stop_gradient")
    run = tiny_run("rows.siamese_feature")
    run = replace(run, objective=Objective(Input(is_masked=True), {"a": dense, "b": whole, "c": same}))
    model, teacher = build(run)
    asked = []

    def watch(images, kinds, summary):
        asked.append((len(images), kinds))
        return teacher(images, kinds, summary)

    nats = nats_of(model, random_batch(run, 4), encoders(watch))
    assert asked == [(8, ("dense", "global"))] and set(nats) == {"a", "b", "c"}


def test_what_could_collapse_is_seen_of_every_target():
    for recipe, names in {
        "m3i.vit_b16": {"image_same", "image_other", "embedding"},
        "rows.mim_pixel": set(),
        "rows.instance_discrimination": {"global"},
        "rows.mim_feature_tokenizer": {"dense"},
        "hvp.vit_b16": {"clusters", "tags_momentum"},
    }.items():
        run = shrink(load(recipe))
        model, teacher = build(run)
        seen = model(random_batch(run, 4), encoders(teacher), BalanceTracker()).seen
        assert set(seen) == names
        parts = [part for one in seen.values() for part in (one.target, one.prediction, one.codes)]
        assert not any(part.requires_grad for part in parts if part is not None)
    assert torch.allclose(seen["clusters"].codes.sum(dim=1), torch.ones(8))
