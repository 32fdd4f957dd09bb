"""Do runs check themselves, and survive being written down?"""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from itertools import product
from operator import getitem

import pytest
import torch
from pydantic import TypeAdapter

from pretrain.config import Backbone, Clusters, Decoder, Mask, Mixing, Optim, Run, Source, Tags, Text, Views
from pretrain.facts import DataFacts
from pretrain.models.backbone import build_encoder
from pretrain.objective import Input, Objective, Target
from pretrain.objectives import OBJECTIVES
from pretrain.optim import learning_rate, make_optimizer, teacher_momentum
from pretrain.randomness import seed_step
from pretrain.recipes import load, names
from tests.fakes import FACTS, shrink


@pytest.mark.parametrize("recipe", names())
def test_a_resolved_run_read_back_is_equal(recipe):
    run = load(recipe)
    assert Run.from_json(run.to_json()) == run
    assert Run.from_json(shrink(run).to_json()) == shrink(run)


DECODED = Target("dense", "gaussian", "same", "ema", "stop_gradient")


def mixed_run(ratio, **targets):
    """The demo on 8 x 8 squares, `ratio` of them the second image's, with other targets."""
    run = load("m3i.demo")
    return replace(run, mask=replace(run.mask, ratio=ratio), objective=Objective(Input(mixed=2), targets))


def changed(text, *path_and_value):
    """JSON text with one more, or another, value at a path."""
    whole = json.loads(text)
    *path, name, value = path_and_value
    owner = whole
    for key in path:
        owner = owner[key]
    owner[name] = value
    return json.dumps(whole)


def test_a_written_field_that_no_run_has_is_refused_by_name():
    text = changed(load("m3i.demo").to_json(), "balance", "gamma", 50)
    text = changed(text, "objective", "targets", "image_same", "wieght", 2.0)
    message = r"objective\.targets\.image_same\.wieght=2\.0, balance\.gamma=50: no such .* remove it or write"
    with pytest.raises(ValueError, match=message):
        Run.from_json(text)
    with pytest.raises(ValueError, match=r"^vocabulary=7: no such field in a DataFacts of this version"):
        DataFacts.from_json(changed(FACTS.to_json(), "vocabulary", 7))


def test_a_field_that_is_not_written_has_its_default():
    run, whole = load("m3i.demo"), json.loads(load("m3i.demo").to_json())
    del whole["decoder"], whole["pool"]["norm"]
    expected = replace(run, decoder=Decoder(), pool=replace(run.pool, norm="none"))
    assert run != expected and Run.from_json(json.dumps(whole)) == expected
    assert DataFacts.from_json('{"categories": ["a"], "vocab_size": 0}') == DataFacts(("a",), 0)


def test_unknown_recipe_lists_the_choices():
    with pytest.raises(
        ValueError, match=r"'m3i\.demoo' is unknown, did you mean 'm3i\.demo'\? choose from \['m3i\.vit_b16'"
    ):
        load("m3i.demoo")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(ratio=1.0), r"mask\.ratio=1\.0 must lie in \(0, 1\)"),
        (lambda: Views(scale=(0.5, 0.2)), r"views\.scale=\(0\.5, 0\.2\)"),
        (lambda: Views(solarize=(0.0, 1.2)), r"views\.solarize\[1\]=1\.2 must lie in \[0, 1\]"),
        (lambda: Views(std=(0.2, 0.0, 0.2)), r"views\.std\[1\]=0\.0 must be positive"),
        (lambda: Views(jitter=(0.4, 0.4, 0.2, 0.6)), r"views\.jitter=.* its hue at most 0\.5 of a turn"),
        (
            lambda: Views(blur_sigma=(2.0, 0.1)),
            r"views\.blur_sigma=\(2\.0, 0\.1\) must be an increasing pair",
        ),
        (lambda: Optim(betas=(0.9, 1.0)), r"optim\.betas=\(0\.9, 1\.0\) must lie in \[0, 1\)"),
        (lambda: Optim(lr=0.0), r"optim\.lr=0\.0 must be positive"),
        (lambda: Source("text", weight=-1), r"data\.weight=-1 must be positive"),
        (lambda: replace(load("m3i.demo"), batch=63), r"batch=63 counts images"),
        (lambda: replace(load("m3i.demo"), mask=Mask(ratio=0.51, patch=8)), r"must be a whole number"),
        (lambda: replace(load("m3i.demo"), views=Views(size=65)), r"views\.size=65 must be a multiple"),
        (lambda: replace(load("m3i.demo"), steps=10), r"optim\.warmup=40 is longer than steps=10"),
        (lambda: replace(load("m3i.demo"), data={}), r"run\.data is empty"),
        (lambda: Input(mixed=3), r"input\.mixed=3"),
        (lambda: Target("pixels", "boltzmann"), r"score='boltzmann' does not fit kind='pixels'"),
        (
            lambda: Target("dense", "gaussian", "same", "ema", "negatives"),
            r"score='gaussian' does not fit encoder='ema', keep='negatives'",
        ),
        (
            lambda: Target("global", "cosine", "same", "ema", "decorrelation"),
            r"score='cosine' does not fit encoder='ema', keep='decorrelation'",
        ),
        (lambda: Target("pixels", "gaussian", "same", "ema", "none"), r"has no meaning here"),
        (
            lambda: Target("pixels", "gaussian", "other", "raw", "none", scored="hidden"),
            r"scored='hidden' means patches of the input itself",
        ),
        (lambda: Input(mixed=2, is_masked=True), r"would hide every patch twice"),
        (
            lambda: Objective(
                Input(), {"p": Target("pixels", "gaussian", "same", "raw", "none", scored="hidden")}
            ),
            r"the input hides none",
        ),
        (lambda: Target("dense", "gaussian"), r"would collapse"),
        (lambda: Target("text", "boltzmann", weight=0), r"weight=0 must be positive"),
        (lambda: Input(mixed=2, views=2), r"input\.views=2 must be 1, or 2"),
        (
            lambda: Target("dense", "cosine", "other", "frozen", "stop_gradient", decoder="linear"),
            r"decoder='linear' predicts a patch from the token at its place",
        ),
        (
            lambda: Target("dense", "cosine", "same", "frozen", "stop_gradient", summary=True),
            r"summary=True is one more token for a linear decoder",
        ),
        (
            lambda: Target("dense", "cosine", "same", "ema", "stop_gradient", is_standardised=False),
            r"is_standardised=False is about pixels",
        ),
        (
            lambda: Target("dense", "cosine", "same", "ema", "stop_gradient", uniformity=0.02),
            r"uniformity=0\.02 must be 0, or positive with kind='dense', score='gaussian'",
        ),
        (lambda: Target("tags", "boltzmann", "same", "raw", "none"), r"choose from \('bernoulli',\)"),
        (
            lambda: Objective(
                Input(), {"c": Target("clusters", "boltzmann", "other", "learned", "sinkhorn")}
            ),
            r"swaps the clusters of two views: set input\.views=2",
        ),
        (
            lambda: Objective(
                Input(views=2), {"i": Target("global", "boltzmann", "other", "ema", "negatives")}
            ),
            r"would meet both views of an image among its negatives",
        ),
        (
            lambda: Objective(Input(), {"t": Target("text", "boltzmann")}, gamma=2.0),
            r"objective\.gamma=2\.0 balances label losses against image losses",
        ),
        (
            lambda: Objective(Input(), {"t": Target("text", "boltzmann")}, gamma=0.0),
            r"gamma=0\.0 must be positive",
        ),
        (lambda: Tags(width=30), r"tags\.width=30 must be a multiple of tags\.heads=4 and of 4"),
        (lambda: Tags(min_score=1.5), r"tags\.min_score=1\.5 must lie in \[0, 1\]"),
        (lambda: Tags(negative_focus=-1), r"tags\.negative_focus=-1 must not be negative"),
        (
            lambda: Text(length=513),
            r"text\.length=513 must be at most 512, the positions of BERT: longer captions",
        ),
        (lambda: Clusters(epsilon=0), r"clusters\.epsilon=0 must be positive"),
        (
            lambda: Target("clusters", "boltzmann", "same", "learned", "sinkhorn"),
            r"view='same' of a clusters target would be ignored: .* leave clusters at view='other'",
        ),
        (lambda: Target("text", "boltzmann", "other"), r"view='other' of a text target would be ignored"),
        (
            lambda: Target("tags", "bernoulli", "other", "raw", "none"),
            r"view='other' of a tags target would be ignored",
        ),
        (
            lambda: Mask(shape="scattered", min_block=4),
            r"mask\.min_block=4 would be ignored: .* mask\.shape='scattered' .* leave it out",
        ),
        (lambda: Mixing(temperature=0.0), r"mixing\.temperature=0\.0 must be positive"),
        (lambda: Mixing(temperature=math.inf), r"mixing\.temperature=inf must be finite"),
        (lambda: Optim(lr=math.inf), r"optim\.lr=inf must be finite"),
        (lambda: Views(jitter=(0.4, math.inf, 0.2, 0.1)), r"views\.jitter=.*inf.* nor above 10, its hue"),
        (lambda: Views(jitter=(math.nan, 0.0, 0.0, 0.0)), r"views\.jitter=\(nan, .*: 0 leaves one as it is"),
        (
            lambda: Views(mean=(123.7, 116.3, 103.5)),
            r"views\.mean=\(123\.7, .* must lie in \[0, 1\], .*: divide numbers for levels up to 255 by 255",
        ),
        (lambda: Views(mean=(math.nan, 0.0, 0.0)), r"views\.mean=\(nan, 0\.0, 0\.0\) must lie in"),
        (lambda: Views(std=(1e-300, 1.0, 1.0)), r"views\.std=\(1e-300, .* must lie in \[0\.003906, 1\]"),
        (
            lambda: Views(blur_sigma=(0.1, math.inf)),
            r"views\.blur_sigma=\(0\.1, inf\) .*, at most 224: views",
        ),
        (
            lambda: Views(ratio=(1.0, math.inf)),
            r"views\.ratio=\(1\.0, inf\) .* pair in \[0\.01, 100\]: 1 1 crops",
        ),
        (lambda: replace(load("m3i.demo"), seed=2**32), r"seed=4294967296 must lie in \[0, 4294967295\]"),
        (lambda: replace(load("m3i.demo"), seed=-1), r"seed=-1 must lie in \[0, 4294967295\]"),
        (
            lambda: replace(load("m3i.demo"), mask=Mask(patch=64)),
            r"mask\.patch=64 leaves 1 x 1 squares .* a mask needs 2 x 2: set views\.size=128 or more",
        ),
        (
            lambda: replace(load("rows.classification"), mixing=Mixing(pairs="same")),
            r"mixing\.pairs='same' would be ignored: all its inputs show one image",
        ),
        (lambda: Mask(shape="scattered", aspect=0.5), r"mask\.aspect=0\.5 would be ignored"),
        (
            lambda: mixed_run(0.25, d=DECODED),
            r"mask\.ratio=0\.25 gives image 0 48 of 64 patches, and target 'd' .* set mask\.ratio=0\.5, or a target",
        ),
        (lambda: Objective(Input(), {}), r"predicts at least one target"),
        (lambda: Objective(Input(), {"t": Target("text", "boltzmann", image=1)}), r"asks for image 1"),
    ],
)
def test_a_value_that_cannot_work_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def floats(data, *path):
    """Path and value of every float of dataclasses, dicts and tuples in each other."""
    if isinstance(data, float):
        return [(path, data)]
    if is_dataclass(data):
        data = {one.name: getattr(data, one.name) for one in fields(data)}
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, tuple) else ()
    return [found for key, value in parts for found in floats(value, *path, key)]


def test_no_number_of_a_run_is_nan_or_infinite():
    run, runs = load("m3i.demo"), TypeAdapter(Run)
    places, text = [path for path, _ in floats(run)], run.to_json()
    assert {("optim", "betas", 1), ("guard", "deviations"), ("objective", "gamma")} <= set(places)
    for (*owner, field), value in product(places, (math.nan, math.inf, -math.inf)):
        whole = json.loads(text)
        reduce(getitem, owner, whole)[field] = value
        with pytest.raises(ValueError, match=r"nan|inf"):
            runs.validate_python(whole)


def test_a_part_of_a_shard_is_no_window():
    mixing = Mixing()
    object.__setattr__(mixing, "window", 2.5)  # types are checked in tests alone
    with pytest.raises(
        ValueError, match=r"mixing\.window=2\.5 counts shards and must be a whole number: set 2"
    ):
        mixing.__post_init__()


@pytest.mark.parametrize(
    "targets",
    [
        {"d": replace(DECODED, image=0), "e": replace(DECODED, image=1)},
        {"d": replace(DECODED, decoder="linear")},
        {"c": Target("category", "boltzmann")},
    ],
    ids=lambda targets: f"{len(targets)} {next(iter(targets.values())).kind}",
)
def test_images_of_unequal_shares_may_be_predicted_apart(targets):
    run = mixed_run(0.25, **targets)
    assert run.mask.ratio == 0.25


def test_m3i_needs_the_other_view_of_the_second_image_only():
    assert OBJECTIVES["m3i"].needs_other_view() == (False, True)


def test_schedules_start_peak_and_end_where_the_recipe_says():
    run = load("m3i.vit_b16")
    assert learning_rate(0, run) == pytest.approx(1e-3 / run.optim.warmup)
    assert learning_rate(run.optim.warmup, run) == pytest.approx(1e-3)
    assert learning_rate(run.steps, run) == pytest.approx(0, abs=1e-12)
    assert teacher_momentum(0, run) == pytest.approx(0.995)
    assert teacher_momentum(run.steps // 2, run) == pytest.approx(0.9975, rel=1e-5)
    assert teacher_momentum(run.steps, run) == pytest.approx(1.0)


def test_swins_biases_by_relative_position_do_not_decay():
    encoder = build_encoder(Backbone("swin", "swin_tiny", drop_path=0.0, drop_path_schedule="linear"), 64)
    tables = {
        id(p) for name, p in encoder.named_parameters() if name.endswith("relative_position_bias_table")
    }
    _, constant = make_optimizer(encoder, Optim(weight_decay=0.1)).param_groups
    assert tables and tables <= {id(p) for p in constant["params"]} and constant["weight_decay"] == 0.0


def test_biases_norms_and_tokens_do_not_decay():
    encoder = build_encoder(Backbone("vit", "vit_tiny", drop_path=0.0), 32)
    name_of = {id(p): name for name, p in encoder.named_parameters()}
    decaying, constant = (
        {name_of[id(p)] for p in group["params"]}
        for group in make_optimizer(encoder, Optim(weight_decay=0.1)).param_groups
    )
    assert "vit.cls_token" in constant and "vit.norm.weight" in constant
    assert {"vit.patch_embed.proj.weight", "vit.pos_embed", "vit.blocks.0.mlp.fc1.weight"} <= decaying
    assert all(name.endswith(("weight", "pos_embed")) for name in decaying)


def test_the_largest_seed_fits_torch_at_any_step_and_rank():
    with torch.random.fork_rng():
        seed_step(2**32 - 1, step=10**7, rank=10**4)
        first = torch.rand(4)
        seed_step(2**32 - 2, step=10**7, rank=10**4)
        assert not torch.equal(first, torch.rand(4))


def test_micro_batches_divide_a_rank_s_inputs():
    run = replace(shrink(load("m3i.demo")), batch=24)  # pairs: 12 inputs, 6 a rank
    assert [run.images_per_rank(2, parts) for parts in (1, 2, 3, 6)] == [12] * 4
    with pytest.raises(ValueError, match=r"--micro-batches 4 must divide the 6 inputs of a rank .*: set 3"):
        run.images_per_rank(2, 4)
