"""Is the table of objectives the paper's?"""

from __future__ import annotations

from itertools import product

from pretrain.objective import LABELS, Objective
from pretrain.objectives import GUIDES, HVP, INSTANCE, M3I, MVP, OBJECTIVES, SINGLE


def coordinates(objective: Objective) -> tuple[str, bool, str]:
    """(view, is the input masked, kind) of an objective of one target."""
    (target,) = objective.targets.values()
    return target.view, objective.input.is_masked, target.kind


def test_the_twelve_self_supervised_rows_are_the_product_of_views_inputs_and_representations():
    rows = [o for o in SINGLE.values() if not {t.kind for t in o.targets.values()} & set(LABELS)]
    expected = set(product(("same", "other"), (False, True), ("pixels", "dense", "global")))
    assert {coordinates(row) for row in rows} == expected
    assert len(rows) == len(expected) == 12 and len(SINGLE) == 14


def test_rows_have_the_likelihood_and_regulariser_of_table_1():
    table = {
        "classification": ("boltzmann", "negatives"),
        "contrastive_language_image": ("boltzmann", "negatives"),
        "auto_encoder": ("gaussian", "none"),
        "dense_distillation": ("gaussian", "stop_gradient"),
        "global_distillation": ("boltzmann", "stop_gradient"),
        "mim_pixel": ("gaussian", "none"),
        "mim_feature": ("gaussian", "stop_gradient"),
        "mim_global": ("gaussian", "stop_gradient"),
        "novel_view_synthesis": ("gaussian", "none"),
        "dense_instance_discrimination": ("boltzmann", "negatives"),
        "instance_discrimination": ("boltzmann", "negatives"),
        "siamese_pixel": ("gaussian", "none"),
        "siamese_feature": ("gaussian", "stop_gradient"),
        "siamese_global": ("boltzmann", "negatives"),
    }
    found = {name: next(iter(objective.targets.values())) for name, objective in SINGLE.items()}
    assert {name: (target.score, target.keep) for name, target in found.items()} == table


def test_instance_discrimination_has_all_three_regularisers():
    rows = [SINGLE["instance_discrimination"], *INSTANCE.values()]
    assert {coordinates(row) for row in rows} == {("other", False, "global")}
    keeps = [next(iter(row.targets.values())).keep for row in rows]
    assert keeps == ["negatives", "stop_gradient", "decorrelation"]


def test_m3i_mixes_two_images_and_predicts_four_targets():
    row = M3I["m3i"]
    assert row.input.mixed == 2 and list(row.targets) == ["image_same", "image_other", "category", "text"]
    views = {t.image: (t.view, t.scored) for t in row.targets.values() if t.kind == "dense"}
    assert views == {0: ("same", "hidden"), 1: ("other", "all")}


def test_the_ablation_of_target_views_has_all_four_choices():
    rows = [row for name, row in M3I.items() if name.startswith("m3i_without_labels")]
    assert {tuple(t.view for t in row.targets.values()) for row in rows} == set(
        product(("same", "other"), repeat=2)
    )
    assert all([t.image for t in row.targets.values()] == [0, 1] for row in rows)


def test_the_ablation_of_the_gradient_ratio_reaches_from_0_2_to_5():
    rows = [row for name, row in M3I.items() if name.startswith("m3i_gamma")]
    assert [row.gamma for row in rows] == [0.2, 0.5, 2.0, 5.0] and M3I["m3i"].gamma == 1.0
    assert all((row.input, row.targets) == (M3I["m3i"].input, M3I["m3i"].targets) for row in rows)


def test_masked_features_have_all_three_target_encoders():
    rows = [SINGLE["mim_feature"], GUIDES["mim_feature_frozen"], GUIDES["mim_feature_tokenizer"]]
    assert {coordinates(row) for row in rows} == {("same", True, "dense")}
    targets = [next(iter(row.targets.values())) for row in rows]
    assert [target.encoder for target in targets] == ["ema", "frozen", "tokenizer"]
    assert {(target.keep, target.scored) for target in targets} == {("stop_gradient", "hidden")}
    assert [row.needs_guide for row in rows] == [False, True, True]


def test_mvp_scores_the_class_and_every_patch_of_a_masked_view_by_one_linear_layer():
    (target,) = MVP["mvp"].targets.values()
    assert coordinates(MVP["mvp"]) == ("same", True, "dense")
    assert (target.score, target.encoder, target.decoder) == ("cosine", "frozen", "linear")
    assert target.summary and target.scored == "all"


def test_hvp_adds_four_losses_with_fixed_weights():
    names = ["tags", "clusters", "pixels", "tags_momentum"]
    assert [list(row.targets) for row in HVP.values()] == [names[:1], names[:2], names[:3], names]
    told = {n: (t.kind, t.score, t.view, t.encoder, t.weight) for n, t in HVP["hvp_mtl"].targets.items()}
    assert told == {
        "tags": ("tags", "bernoulli", "same", "raw", 0.001),
        "clusters": ("clusters", "boltzmann", "other", "learned", 2 * 0.02),
        "pixels": ("pixels", "laplace", "same", "raw", 1.0),
        "tags_momentum": ("tags", "boltzmann", "same", "ema", 10.0),
    }
    assert all(row.gamma is None and row.input.views == 2 for row in HVP.values())
    assert [row.input.is_masked for row in HVP.values()] == [False, False, True, True]


def test_every_row_is_in_the_table():
    tables = [SINGLE, GUIDES, INSTANCE, M3I, MVP, HVP]
    assert {name: row for table in tables for name, row in table.items()} == OBJECTIVES
    assert len(OBJECTIVES) == sum(map(len, tables))
