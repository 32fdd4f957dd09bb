"""Is the table of objectives the paper's?"""

from __future__ import annotations

from itertools import product

from pretrain.objectives import INSTANCE, LABELS, M3I, OBJECTIVES, SINGLE, Objective


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


def test_every_row_is_in_the_table():
    assert OBJECTIVES == SINGLE | INSTANCE | M3I
    assert len(OBJECTIVES) == len(SINGLE) + len(INSTANCE) + len(M3I)
