"""Does a comparison give every method the same, and refuse what cannot work before anything is run?"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.schema import Manifest
from pretrain.compare.comparisons import COMPARISONS, Variant, choose
from pretrain.compare.plan import Job, Settings, _fingerprint, plan
from pretrain.objectives import OBJECTIVES, SINGLE
from tests.data.sets import good_set, sample, write_set


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("compared")
    for split in ("train", "heldout"):
        write_set(
            folder / "names" / split, [[sample(n, tags=[["red", 1.0]]) for n in range(21)]], tags=("red",)
        )
    data = {"names": folder / "names" / "train"}
    return Settings(data, {"names": folder / "names"}, {}, folder / "out", (3, 5), steps=20)


def planned(name: str, settings: Settings) -> list[Job]:
    return plan(COMPARISONS[name], settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": {"train": Path("x")}}, r"--sets train=\.\.\. names files: .* not 'train'"),
        ({"sets": {"../s": Path("x")}}, r"--sets \.\./s=\.\.\. names files"),
        ({"overrides": ("--seed", "5")}, r"--seed is the comparison's to decide"),
        ({"overrides": ("--name=x",)}, r"--name=x is the comparison's to decide"),
    ],
)
def test_what_would_mix_up_jobs_is_refused(settings: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned("m3i", replace(settings, **changes))


def test_sets_that_probes_cannot_use_are_refused_before_anything_runs(
    settings: Settings, tmp_path: Path
) -> None:
    for name, numbers, labels in (("few", 19, True), ("captions", 21, False)):
        for split in ("train", "heldout"):
            made = [sample(number, has_category=labels) for number in range(numbers)]
            write_set(tmp_path / name / split, [made])
    with pytest.raises(ValueError, match=r"few/train has 19 images, kNN needs 20"):
        planned("m3i", replace(settings, sets={"few": tmp_path / "few"}))
    with pytest.raises(ValueError, match=r"captions has no categories, which the probes tell apart"):
        planned("m3i", replace(settings, sets={"captions": tmp_path / "captions"}))


def test_a_guide_is_another_one_by_its_bytes_not_by_its_date(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = _fingerprint(tmp_path)
    os.utime(tmp_path / "config.json", (1, 1))
    assert _fingerprint(tmp_path) == before
    (tmp_path / "config.json").write_text("[]")
    assert _fingerprint(tmp_path) != before


def test_a_variant_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--only \['m3i', 'm3i'\] names one twice"):
        choose("m3i", ("m3i", "m3i"))


def test_ways_of_asking_have_files_of_their_own(settings: Settings) -> None:
    one, other = (planned("m3i", replace(settings, fine_tune=epochs))[0] for epochs in (0, 1))
    (task,), (tuned,) = ([t for t in job.tasks if t.name == "names"] for job in (one, other))
    assert one.todo(task) != other.todo(tuned)


def test_all_methods_of_a_seed_come_before_the_next_seed(settings: Settings) -> None:
    jobs = planned("everything", settings)
    assert [job.run.seed for job in jobs] == [3] * 16 + [5] * 16
    assert {job.variant.row for job in jobs} == {*SINGLE, "m3i", "m3i_without_mixing"}
    assert len({job.folder for job in jobs}) == 32


@pytest.mark.parametrize("is_full", [False, True])
def test_methods_differ_in_nothing_but_their_objective(settings: Settings, is_full: bool) -> None:
    for name in ("everything", "target_views", "gradient_ratio", "hvp_losses"):
        runs = [job.run for job in planned(name, replace(settings, is_full=is_full, batch=8))]
        same = {
            "name": "",
            "objective": OBJECTIVES["m3i"],
            "data": runs[0].data,
            "mask": runs[0].mask,
            "seed": 0,
        }
        assert len({replace(run, **same).to_json() for run in runs}) == 1
        assert {(run.steps, run.batch, tuple(run.data)) for run in runs} == {(20, 8, ("names",))}


def test_a_row_is_given_the_one_label_that_it_predicts(settings: Settings) -> None:
    given = {job.variant.row: job.run.data["names"].supervision for job in planned("everything", settings)}
    assert given["classification"] == given["m3i"] == given["m3i_without_mixing"] == "category"
    assert given["contrastive_language_image"] == "text"
    assert {given[row] for row in SINGLE if row not in ("classification", "contrastive_language_image")} == {
        "none"
    }


def test_only_the_first_method_of_a_seed_is_evaluated_untrained(settings: Settings) -> None:
    commands = [
        task.command for job in planned("m3i", settings) for task in job.tasks if task.name == "names"
    ]
    steps = [command[command.index("--steps") + 1] for command in commands]
    assert steps == ["first,last", *["last"] * 4] * 2


def test_hvp_keeps_its_weights_and_its_mask_at_small_size(settings: Settings) -> None:
    run = planned("hvp_losses", settings)[3].run
    weights = {name: target.weight for name, target in run.objective.targets.items()}
    assert weights == {"tags": 0.001, "clusters": 0.04, "pixels": 1.0, "tags_momentum": 10.0}
    assert (run.mask.shape, run.mask.ratio) == ("scattered", 38 / 64)  # 29 of 49, of 8 x 8
    assert run.data["names"].supervision == "tags"


def test_a_row_of_the_readers_own_is_trained_as_itself_at_full_size(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = replace(OBJECTIVES["siamese_feature"], targets=dict(OBJECTIVES["siamese_feature"].targets))
    monkeypatch.setitem(OBJECTIVES, "mine", mine)
    comparison = replace(COMPARISONS["m3i"], variants=(Variant("mine", "mine"),))
    jobs = plan(comparison, replace(settings, is_full=True, batch=8))
    assert all(job.run.objective is mine for job in jobs)


def test_labels_that_no_data_set_has_are_refused(settings: Settings, tmp_path: Path) -> None:
    for split in ("train", "heldout"):
        good_set(tmp_path / "bare" / split, has_text=False, has_category=False)
    bare = replace(settings, data={"bare": tmp_path / "bare" / "train"})
    with pytest.raises(ValueError, match=r"'classification' predicts \['category'\], none of the data sets"):
        planned("m3i", bare)


def test_overrides_reach_every_recipe_and_misspelt_ones_end_the_start(settings: Settings) -> None:
    jobs = planned("m3i", replace(settings, overrides=("--views.scale", "0.2", "0.9", "--optim.lr", "3e-4")))
    assert {(job.run.views.scale, job.run.optim.lr) for job in jobs} == {((0.2, 0.9), 3e-4)}
    with pytest.raises(SystemExit):
        planned("m3i", replace(settings, overrides=("--views.scael", "0.2", "0.9")))


def test_ranks_reach_the_launcher(settings: Settings) -> None:
    (train, *_) = planned("m3i", replace(settings, ranks=2))[0].tasks
    assert train.command[:2] == ("env", "RANKS=2") and train.command[2].endswith("jobs/local/pretrain.sh")


def test_full_size_takes_the_epochs_of_the_papers_table(settings: Settings) -> None:
    full = replace(settings, is_full=True, steps=None, batch=4, seeds=(0,))
    images = Manifest.read(settings.data["names"]).num_samples
    for name, backbone in (("gradient_ratio", "vit_b16"), ("guides", "vit_b16"), ("hvp_losses", "swin_b")):
        comparison = COMPARISONS[name]
        jobs = plan(
            comparison, replace(full, guides=dict.fromkeys(comparison.guides, settings.data["names"]))
        )
        assert {job.run.backbone.size for job in jobs} == {backbone}
        assert {job.run.steps for job in jobs} == {comparison.epochs * images // 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (1, 1)}, "names one twice"),
        ({"guides": {"clip": Path("x")}}, r"--guide names \['clip'\], this comparison needs \[\]"),
        ({"steps": 0}, "--steps 0 must be positive"),
        ({"batch": -2}, "--batch -2 must be positive"),
        ({"ranks": 3}, "must be a multiple of"),
        ({"fine_tune": -1}, "--fine-tune -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Settings, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned("m3i", replace(settings, **changes))


def test_a_set_without_held_out_images_is_refused(settings: Settings, tmp_path: Path) -> None:
    good_set(tmp_path / "half" / "train")
    with pytest.raises(FileNotFoundError, match="must hold train/ and one of heldout/, val/, test/"):
        planned("m3i", replace(settings, sets={"half": tmp_path / "half"}))


def test_names_that_are_unknown_list_the_choices() -> None:
    with pytest.raises(ValueError, match=r"comparison 'all' is unknown; choose from \['instances'"):
        choose("all")
    with pytest.raises(ValueError, match=r"--only \['m4i'\] are no variants of 'm3i'"):
        choose("m3i", ("m4i",))
    with pytest.raises(ValueError, match="has no use for one"):
        Variant("x", "m3i", "clip")


def test_some_variants_can_be_chosen_in_any_order() -> None:
    assert [variant.name for variant in choose("m3i", ("m3i", "classification")).variants] == [
        "m3i",
        "classification",
    ]
