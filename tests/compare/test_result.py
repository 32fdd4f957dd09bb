"""Does the table say what the runs measured, and no more?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pretrain.compare import tell
from pretrain.compare.comparisons import COMPARISONS, choose
from pretrain.compare.plan import TRAIN, Job, Settings, Task
from pretrain.compare.result import OVERALL, Column, Spread, collect, order_agreement
from pretrain.objectives import OBJECTIVES
from pretrain.recipes import load
from pretrain.visualize.dots import Dot, Panel, dot_panels

COMPARISON = choose("m3i", ("m3i", "siamese_feature", "mim_feature", "classification"))
MEASURED = {  # variant -> seed -> (kNN, dense)
    "m3i": {0: (0.5, 0.4), 1: (0.7, 0.4)},
    "siamese_feature": {0: (0.4, 0.3), 1: (0.4, 0.3)},
    "mim_feature": {0: (0.3, 0.2), 1: (0.3, 0.2)},
    "classification": {0: (0.2, 0.1)},
}


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    made = []
    for variant in COMPARISON.variants:
        for seed in (0, 1):
            folder = tmp_path / f"{variant.name}-seed{seed}"
            folder.mkdir()
            run = replace(load("m3i.demo"), seed=seed, objective=OBJECTIVES[variant.row])
            tasks = (
                Task(TRAIN, (), {"data": {"scenes": "1"}, "guide": None}),
                Task("scenes", (), {"fine_tune": 0}),
            )
            made.append(Job(variant, run, folder, tasks))
            if seed in MEASURED[variant.name]:
                knn, dense = MEASURED[variant.name][seed]
                rows = {"knn": {"accuracy": knn, "chance": 0.1}, "dense": {"accuracy": dense, "chance": 0.02}}
                rows |= {"linear": {"accuracy": None, "reason": "no labels"}}
                checkpoints = {"step_000500": rows}
                if variant.name == "m3i":
                    low = {
                        "knn": {"accuracy": 0.12, "chance": 0.1},
                        "dense": {"accuracy": 0.03, "chance": 0.02},
                    }
                    checkpoints["step_000000"] = low
                (folder / "evaluation-scenes.json").write_text(json.dumps({"checkpoints": checkpoints}))
                made[-1].done("scenes").write_text(json.dumps({"fine_tune": 0}))
    (made[0].folder / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "collapsed": ["image_same"]}\n')
    return made


def settings(tmp_path: Path) -> Settings:
    return Settings({"scenes": tmp_path}, {"scenes": tmp_path}, {}, tmp_path, (0, 1))


@pytest.mark.parametrize("damage", ["{}", "[]", '{"checkpoints": {}}', "cut"])
def test_results_that_are_damaged_or_of_another_question_are_not_told(jobs: list[Job], damage: str) -> None:
    jobs[0].result("scenes").write_text(damage)
    jobs[1].done("scenes").write_text(json.dumps({"fine_tune": 30}))
    (jobs[0].folder / "log.jsonl").write_text("[1]\n")
    assert "m3i" not in collect(jobs).methods


def test_methods_stand_by_the_mean_of_their_probes(jobs: list[Job]) -> None:
    found = collect(jobs)
    assert list(found.methods) == ["m3i", "siamese_feature", "mim_feature", "classification", "untrained"]
    assert [column.title for column in found.columns] == ["scenes kNN", "scenes dense mIoU", "mean of probes"]
    assert found.methods["m3i"][Column("scenes", "knn")].values == (0.5, 0.7)
    assert found.methods["m3i"][OVERALL].values == pytest.approx((0.45, 0.55))
    assert found.methods["untrained"][Column("scenes", "knn")].values == (0.12, 0.12)
    assert found.chance[OVERALL] == pytest.approx(0.06)
    assert found.collapsed == {"m3i": ("image_same",)}


def test_the_spread_over_seeds_is_the_sample_deviation() -> None:
    assert Spread({0: 0.5, 1: 0.7}).text() == "60.0 ± 14.1"
    assert Spread({3: 0.5}).text() == "50.0" and math.isnan(Spread({3: 0.5}).deviation)
    assert Spread({}).text() == "-"


def test_the_mean_takes_each_seed_by_itself_and_only_what_every_method_has(jobs: list[Job]) -> None:
    path = jobs[0].folder / "evaluation-scenes.json"  # m3i, seed 0
    told = json.loads(path.read_text())
    del told["checkpoints"]["step_000500"]["dense"]
    told["checkpoints"]["step_000500"]["linear"] = {"accuracy": 0.9, "chance": 0.1}
    path.write_text(json.dumps(told))
    found = collect(jobs)
    assert found.of("m3i").of_seed == {1: pytest.approx(0.55)}  # not kNN of seed 0 with dense of seed 1
    assert found.of("m3i", Column("scenes", "linear")).values == (0.9,)
    assert Column("scenes", "linear") in found.columns and Column("scenes", "linear") not in found.in_mean
    text = tell.table(COMPARISON, settings(path.parent.parent), jobs, found)
    assert "Not in the mean, since a method lacks it: scenes linear." in text


def test_untrained_networks_count_once_a_seed(jobs: list[Job]) -> None:
    again = jobs[2].folder / "evaluation-scenes.json"  # another method's, seed 0
    told = json.loads(again.read_text())
    told["checkpoints"]["step_000000"] = {"knn": {"accuracy": 0.5, "chance": 0.1}}
    again.write_text(json.dumps(told))
    assert collect(jobs).of("untrained", Column("scenes", "knn")).of_seed == {0: 0.12, 1: 0.12}


def test_a_log_that_a_kill_has_torn_is_read_up_to_there(jobs: list[Job]) -> None:
    with (jobs[0].folder / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "coll')
    assert collect(jobs).collapsed == {"m3i": ("image_same",)}


def test_a_change_of_the_recipe_stands_below_the_table(jobs: list[Job], tmp_path: Path) -> None:
    longer = [
        replace(one, run=replace(one.run, steps=999)) if one.variant.name == "m3i" else one for one in jobs
    ]
    ordered = [*longer[2:], *longer[:2]]
    assert "m3i differs in steps=999." in tell.table(
        COMPARISON, settings(tmp_path), ordered, collect(ordered)
    )


def test_the_order_is_compared_with_the_papers(jobs: list[Job], tmp_path: Path) -> None:
    found = collect(jobs)
    assert order_agreement(COMPARISON, found, "imagenet1k_top1") == (pytest.approx(1.0), 4)
    assert order_agreement(COMPARISON, collect(jobs[:4]), "imagenet1k_top1") is None


def test_the_table_has_a_line_a_method_and_says_how_many_seeds(jobs: list[Job], tmp_path: Path) -> None:
    text = tell.table(COMPARISON, settings(tmp_path), jobs, collect(jobs))
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["m3i"] == "| m3i | 60.0 ± 14.1 | 40.0 ± 0.0 | 50.0 ± 7.1 | 2 of 2 | 0.5 + 1 | image_same |"
    assert lines["classification"].endswith("| 20.0 | 10.0 | 15.0 | 1 of 2 | 1 + 0 |  |")
    assert lines["chance"].startswith("| chance | 10.0 | 2.0 | 6.0 |")
    assert "Kendall's tau +1.00 over 4 methods" in text


def test_the_record_names_data_budget_and_code(jobs: list[Job], tmp_path: Path) -> None:
    record = tell.record("m3i", COMPARISON, settings(tmp_path), jobs, collect(jobs))
    assert record["methods"]["m3i"]["scenes kNN"] == {0: 0.5, 1: 0.7}
    assert record["encoder_passes"]["m3i"] == [0.5, 1.0] and record["gamma"]["m3i"] == 1.0
    assert {"commits", "hardware", "date", "versions", "steps", "batch", "backbone", "seeds"} <= record.keys()
    assert json.loads(json.dumps(record))["in_mean"] == ["scenes kNN", "scenes dense mIoU"]


def test_the_figure_puts_means_seeds_and_chance_where_they_belong() -> None:
    panel = Panel("kNN", 0.0, (Dot(0.5, 0.1, (0.4, 0.6)), None, Dot(1.0, math.nan, (1.0,))))
    svg = ElementTree.fromstring(dot_panels(["a", "<b>", "m3i"], [panel], ["m3i"]))
    space = "{http://www.w3.org/2000/svg}"
    dots = [c for c in svg.iter(f"{space}circle") if c.get("class") == "dot"]
    seeds = [c for c in svg.iter(f"{space}circle") if c.get("class") == "seed"]
    assert len(dots) == 2 and len(seeds) == 3
    middle, end = (float(dot.get("cx")) for dot in dots)
    (bar,) = (line for line in svg.iter(f"{space}line") if line.get("class") == "bar")
    assert (float(bar.get("x1")), float(bar.get("x2"))) == pytest.approx(
        (middle - 0.1 * end, middle + 0.1 * end), rel=0.01
    )
    assert end == pytest.approx(2 * middle, rel=0.01)
    assert "<b>" in [text.text for text in svg.iter(f"{space}text")]


def test_nothing_measured_is_no_table(jobs: list[Job]) -> None:
    bare = [replace(one, tasks=(one.tasks[0], Task("other", (), {}))) for one in jobs]
    assert collect(bare).methods == {}


def test_every_comparison_of_the_issue_is_there() -> None:
    sources = {comparison.source for comparison in COMPARISONS.values()}
    assert {"M3I, table 3", "M3I, table 4", "M3I, table 13", "M3I, table 14", "MVP, table 5"} <= sources
    assert "HVP-MTL, ablation" in sources
