"""Does one forward mix, own, predict and score as the method says?"""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pretrain.balance import BalanceTracker
from pretrain.config import Source
from pretrain.facts import DataFacts
from pretrain.inputs import owned_places, owned_tokens, rows_of
from pretrain.models.pixels import normalise
from pretrain.models.temperature import Temperature
from pretrain.objective import Input, Objective, Target
from pretrain.pretrainer import Pretrainer
from pretrain.recipes import load, names
from pretrain.scoring import Step, dense_matching
from pretrain.served import left_out
from pretrain.targets import encode
from pretrain.towers import Towers
from tests.fakes import FACTS, random_batch, shrink
from tests.stand_ins import encoders, says


def tiny_run(recipe: str = "m3i.vit_b16"):
    run = shrink(load(recipe))
    return replace(run, backbone=replace(run.backbone, drop_path=0.0))


def build(run, seed: int = 0, facts: DataFacts = FACTS):
    torch.manual_seed(seed)
    model, teacher = Pretrainer(run, facts), Towers(run, facts).eval().requires_grad_(False)
    for parameter in model.parameters():  # zero-initialised layers would hide what lies before them
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model, teacher


@pytest.mark.parametrize("recipe", names())
def test_every_recipe_shrunken_reaches_every_parameter(recipe):
    run = tiny_run(recipe)
    model, teacher = build(run)
    tracker = BalanceTracker()
    tracker.is_told = True
    losses = model(random_batch(run, 8), encoders(teacher), tracker)
    losses.total.backward()
    assert set(losses.nats) == set(run.objective.targets)
    assert all(torch.isfinite(value) for value in losses.nats.values())
    for name, each in losses.each.items():  # what is told of images has the loss as its mean
        torch.testing.assert_close(each.nats[each.counts].mean(), losses.nats[name])
        assert len(each.nats) == len(each.position)
    assert all(
        run.objective.targets[name].keep == "decorrelation" for name in losses.nats.keys() - losses.each
    )
    tracker.advance()
    assert set("+".join(tracker.reader_norms).split("+")) == set(losses.nats)
    assert all(norm > 0 for norm in tracker.reader_norms.values())
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad is None for p in teacher.parameters())


def input_of(model, images, mask):
    """What the student's encoder is given for a batch of these images."""
    seen = []
    encoder = model.student.encoder
    compute = encoder.features
    encoder.features = lambda images, keys: seen.append(images) or compute(images, keys)
    batch = replace(random_batch(model.run, len(images)), mask=mask)
    views = torch.stack([images, images], dim=1)
    plain = replace(model.run.views, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)
    run, model.run = model.run, replace(model.run, views=plain)
    model._encode(replace(batch, views=views), BalanceTracker(), torch.float32)
    model.run, encoder.features = run, compute
    return seen[0]


def owned_by(run, batch):
    return owned_tokens(run.objective.input, batch.mask, 1)


def test_masked_input_shows_one_learned_patch_where_it_hides():
    run = tiny_run("rows.mim_pixel")
    model, _ = build(run)
    batch = random_batch(run, 4)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    shown, patch = input_of(model, images, batch.mask), run.mask.patch
    images = images.float()
    hidden = batch.mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None].expand_as(images)
    torch.testing.assert_close(shown[~hidden], images[~hidden])
    assert torch.equal(
        shown[hidden], model.mask_patch.pixels.repeat(1, run.grid, run.grid).expand_as(images)[hidden]
    )
    assert torch.equal(owned_by(run, batch), ~batch.mask.flatten(1))
    assert batch.mask.flatten(1).sum(1).eq(12).all()  # 0.75 of 16


def z_y_of(model, batch):
    asked = {"dtype": torch.float32, "grid": model.grid}
    return encode(model.run, model.targets, batch, says(torch.empty(0)), **asked)


def test_pixel_targets_are_the_standardised_patches_of_the_target_view():
    for row, view in (("mim_pixel", 0), ("siamese_pixel", 1)):
        run = tiny_run(f"rows.{row}")
        model, _ = build(run)
        batch = random_batch(run, 4)
        (target,) = model.targets.values()
        pixels = z_y_of(model, batch)[target.kind]
        mean, std = (
            torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (run.views.mean, run.views.std)
        )
        patch = batch.views[2, view, :, 16:32, 32:48].double()  # row 1, column 2 of a 4 x 4 grid
        patch = ((patch / 255 - mean) / std).flatten()
        expected = (patch - patch.mean()) / patch.std(correction=0)
        torch.testing.assert_close(pixels[2, 6].double(), expected, rtol=1e-4, atol=1e-4)


def test_hidden_pixels_are_predicted_without_being_seen():
    run = tiny_run("rows.mim_pixel")
    model, teacher = build(run)
    batch = random_batch(run, 4)
    views = batch.views.clone()
    hidden = batch.mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand(-1, 3, -1, -1)
    views[:, 0][hidden] = 255 - views[:, 0][hidden]
    asked = []
    model.decoder.register_forward_hook(lambda module, inputs, out: asked.append(out))
    model(batch, encoders(teacher), BalanceTracker())
    model(replace(batch, views=views), encoders(teacher), BalanceTracker())
    assert torch.equal(*asked)


def drawn_places(monkeypatch, grid, num, position):
    """Patches of every image that enter the softmax, [n, num], found again by what is in them."""
    projection = replace(tiny_run("rows.dense_instance_discrimination").projection, dense_samples=num)
    z = torch.randn(len(position), grid**2, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    monkeypatch.setattr(
        "pretrain.scoring.matching_nats",
        lambda *pair_and_scale: seen.extend(pair_and_scale) or torch.zeros(len(position) * num),
    )
    dense_matching(projection, z, -z, position)
    assert torch.equal(seen[0], -seen[1]) and seen[0].shape == (len(position) * num, 8)
    rows, drawn = F.normalize(z, dim=-1), seen[0].unflatten(0, (-1, num))
    return torch.stack([(rows[n, :, None] == drawn[n]).all(-1).int().argmax(0) for n in range(len(position))])


def test_dense_discrimination_matches_each_patch_with_its_own_place(monkeypatch):
    position = torch.tensor([0, 5, 9])
    places = drawn_places(monkeypatch, 4, 6, position)
    assert all(len(set(image)) == 6 for image in places.tolist())
    assert len({tuple(image) for image in places.tolist()}) == 3  # from a start of its own in every image
    # as the position decides, not the place in the batch
    assert torch.equal(drawn_places(monkeypatch, 4, 6, position[1:]), places[1:])


@pytest.mark.parametrize(("grid", "fewest"), [(8, 6), (12, 10), (14, 10)])
def test_sixteen_patches_of_a_view_are_spread_over_its_rows_and_columns(monkeypatch, grid, fewest):
    places = drawn_places(monkeypatch, grid, 16, torch.arange(grid**2))
    assert places[:, 0].unique().numel() == grid**2  # every patch is some image's first
    for image in places.tolist():
        assert len(set(image)) == 16
        assert min(len({p // grid for p in image}), len({p % grid for p in image})) >= fewest


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_all_patches_of_a_small_grid_are_drawn_once(monkeypatch, grid):
    places = drawn_places(monkeypatch, grid, grid**2, torch.arange(3))
    assert places.sort(dim=1).values.tolist() == [list(range(grid**2))] * 3


@pytest.mark.parametrize("recipe", ["m3i.vit_b16", "hvp.swin_b", "rows.instance_discrimination"])
def test_a_step_is_freed_without_the_cyclic_collector(monkeypatch, recipe):
    run = tiny_run(recipe)
    model, teacher = build(run)
    steps = []

    def watched(*arguments):
        step = Step(*arguments)
        steps.append(weakref.ref(step))
        return step

    monkeypatch.setattr("pretrain.pretrainer.Step", watched)
    gc.disable()
    try:
        losses = model(random_batch(run, 4), encoders(teacher), BalanceTracker())
        losses.total.backward()
        del losses
        assert [step() for step in steps] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("row", "chance"),
    [
        ("instance_discrimination", math.log(8)),
        ("dense_instance_discrimination", math.log(8 * 4)),
        ("global_distillation", math.log(8)),
    ],
)
def test_matching_among_equal_targets_is_at_chance(row, chance):
    run = tiny_run(f"rows.{row}")
    model, _ = build(run)

    def constant(images, kinds, summary):
        said = {
            "dense": torch.arange(48.0).expand(len(images), 16, 48),
            "global": torch.arange(32.0).expand(len(images), 32),
        }
        return {kind: said[kind] for kind in kinds}

    (nats,) = model(random_batch(run, 8), encoders(constant), BalanceTracker()).nats.values()
    assert nats.item() == pytest.approx(chance, rel=1e-5)


def test_a_row_without_labels_keeps_no_pooling_and_no_heads():
    towers = Towers(tiny_run("rows.mim_feature"), FACTS)
    assert {name.split(".")[0] for name, _ in towers.named_parameters()} == {"encoder"}
    assert not towers.has_embedding


def test_mixed_input_shows_each_image_where_it_owns_the_patch():
    run = tiny_run()
    model, _ = build(run)
    batch = random_batch(run, 4)
    images = torch.stack([torch.full((3, 64, 64), n, dtype=torch.uint8) for n in range(4)])
    mixed = input_of(model, images, batch.mask).round()
    owned = owned_by(run, batch).view(4, run.grid, run.grid)
    patch = run.mask.patch
    for image in range(4):
        patches = mixed[image // 2, 0, patch // 2 :: patch, patch // 2 :: patch]
        assert ((patches == image) == owned[image]).all()
    assert (owned[0::2] ^ owned[1::2]).all()  # every patch shows exactly one of the pair


def test_roles_follow_the_mask_visible_is_same_view_masked_is_other_view():
    run = tiny_run()
    model, _ = build(run)
    batch = random_batch(run, 4)
    assert rows_of(run.objective, model.targets["image_same"], batch).tolist() == [0, 2]
    assert rows_of(run.objective, model.targets["image_other"], batch).tolist() == [1, 3]
    assert (owned_by(run, batch)[0::2].view_as(batch.mask) == ~batch.mask).all()
    seen = []

    def watch(images, kinds, summary):
        seen.append(images)
        return {"dense": torch.zeros(len(images), run.grid**2, 48)}

    model(batch, encoders(watch), BalanceTracker())
    expected = torch.cat([batch.views[0::2, 0], batch.views[1::2, 1]])
    same = normalise(expected, run.views.mean, run.views.std, torch.float32)
    torch.testing.assert_close(seen[0], same)


def test_label_embedding_never_reads_the_other_images_tokens():
    run = tiny_run()
    model, _ = build(run)
    owned = owned_by(run, random_batch(run, 4))
    tokens = torch.randn(4, run.grid**2, 48)
    noise = torch.where(owned[..., None], tokens, torch.randn_like(tokens))
    torch.testing.assert_close(
        model.student.embed_tokens(tokens, owned), model.student.embed_tokens(noise, owned)
    )


def nats_with_teacher_tokens(model, batch, z_y):
    return model(batch, says(z_y), BalanceTracker()).nats


def test_same_view_is_scored_on_hidden_patches_and_other_view_on_all():
    run = tiny_run()
    model, _ = build(run)
    batch = random_batch(run, 4)
    z_y = torch.randn(4, run.grid**2, 48)  # rows: same view of images 0, 2; other view of images 1, 3
    before = nats_with_teacher_tokens(model, batch, z_y)
    changed = z_y.clone()
    changed[:2][~batch.mask.flatten(1)] = torch.randn_like(changed[:2][~batch.mask.flatten(1)])
    after = nats_with_teacher_tokens(model, batch, changed)
    assert torch.equal(after["image_same"], before["image_same"])
    changed = z_y.clone()
    changed[2:, 0] = torch.randn_like(changed[2:, 0])
    after = nats_with_teacher_tokens(model, batch, changed)
    assert not torch.equal(after["image_other"], before["image_other"])


def test_prediction_depends_on_where_the_other_view_lies():
    run = tiny_run()
    model, _ = build(run)
    batch = random_batch(run, 4)
    z_y = torch.randn(4, run.grid**2, 48)
    before = nats_with_teacher_tokens(model, batch, z_y)
    boxes = batch.boxes.clone()
    boxes[:, 1, :2] += 7
    after = nats_with_teacher_tokens(model, replace(batch, boxes=boxes), z_y)
    assert not torch.equal(after["image_other"], before["image_other"])
    assert torch.equal(after["image_same"], before["image_same"])


def test_target_patches_are_placed_in_the_grid_of_the_input_view():
    run = tiny_run()
    model, _ = build(run)
    batch = random_batch(run, 4)
    boxes = torch.tensor([[0.0, 0, 40, 40, 0], [20.0, 10, 20, 20, 0]]).expand(
        4, 2, 5
    )  # view 1, the other view
    asked = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[2]))
    nats_with_teacher_tokens(model, replace(batch, boxes=boxes), torch.randn(4, run.grid**2, 48))
    same, other = (relative[0].view(run.grid, run.grid, 4) for relative in asked)
    steps = torch.arange(run.grid, dtype=torch.float32)
    torch.testing.assert_close(same[..., 0], steps[:, None].expand(-1, run.grid))
    torch.testing.assert_close(same[..., 1], steps[None].expand(run.grid, -1))
    assert not same[..., 2:].any()
    half = (
        steps + 0.5
    ) / 2 - 0.5  # view 2 is half as large, and lies half a view below, a quarter to the right
    torch.testing.assert_close(other[..., 0], (half + run.grid / 2)[:, None].expand(-1, run.grid))
    torch.testing.assert_close(other[..., 1], (half + run.grid / 4)[None].expand(run.grid, -1))
    torch.testing.assert_close(other[..., 2:], torch.full_like(other[..., 2:], 0.5).log())


def test_batch_without_labels_still_runs_every_module():
    run = tiny_run()
    model, teacher = build(run)
    batch = random_batch(run, 4)
    bare = replace(
        batch, category=torch.full_like(batch.category, -1), token_mask=torch.zeros_like(batch.token_mask)
    )
    losses = model(bare, encoders(teacher), BalanceTracker())
    losses.total.backward()
    assert losses.nats["category"] == 0 and losses.nats["text"] == 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_targets_without_labels_in_the_data_are_left_out():
    run = tiny_run()
    model, teacher = build(run, facts=DataFacts(categories=FACTS.categories, vocab_size=0))
    losses = model(random_batch(run, 4), encoders(teacher), BalanceTracker())
    assert set(losses.nats) == {"image_same", "image_other", "category"}
    assert not hasattr(model.student, "text")


def test_what_is_left_out_for_want_of_labels_is_said_with_the_reason():
    run = load("m3i.demo")
    unlabelled = {"photos": Source("none"), "named": Source("category")}
    line = left_out(replace(run, data=unlabelled), DataFacts(categories=("cat", "dog"), vocab_size=0))
    assert (
        "LEFT OUT of the objective of m3i.demo: text (no source has supervision='text'); the others" in line
    )
    assert "{'photos': 'none', 'named': 'category'}" in line
    line = left_out(run, DataFacts(categories=(), vocab_size=0))
    assert "category (no source has supervision='category'), text (no source" in line
    assert left_out(run, FACTS) is None
    assert left_out(load("rows.mim_pixel"), DataFacts(categories=(), vocab_size=0)) is None


def test_objective_that_the_data_cannot_serve_is_refused():
    run = tiny_run()
    objective = Objective(Input(), {"text": Target("text", "boltzmann")})
    with pytest.raises(ValueError, match="none of the targets"):
        build(replace(run, objective=objective), facts=DataFacts(categories=(), vocab_size=0))


def test_balance_weight_multiplies_the_label_losses_only():
    run = tiny_run()
    model, teacher = build(run)
    tracker = BalanceTracker()
    tracker.load_state_dict({"averages": [0.0, 0.0], "counts": [0.0, 0.0], "weight": 3.0})
    losses = model(random_batch(run, 4), encoders(teacher), tracker)
    nats = losses.nats
    expected = nats["image_same"] + nats["image_other"] + 3 * (nats["category"] + nats["text"])
    torch.testing.assert_close(losses.total.detach(), expected)


def test_mask_squares_must_be_whole_tokens():
    run = tiny_run()
    with pytest.raises(ValueError, match=r"mask\.patch=8 must be a multiple of 16"):
        Towers(replace(run, mask=replace(run.mask, patch=8)), FACTS)


def test_owned_places_lists_the_owned_tokens_in_order():
    owned = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert owned_places(owned, 2).tolist() == [[0, 2], [2, 3]]


def test_a_temperature_beyond_its_bound_can_come_back_but_not_go_on():
    temperature = Temperature(200.0, 100.0)
    assert temperature().item() == 100.0
    (down,) = torch.autograd.grad(temperature(), temperature.log_scale)
    (up,) = torch.autograd.grad(-temperature(), temperature.log_scale)
    assert down.item() == pytest.approx(200.0) and up.item() == 0.0
