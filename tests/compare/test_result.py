"""Does the table say what the runs measured, and no more?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pretrain.compare import result
from pretrain.compare.comparisons import COMPARISONS, choose
from pretrain.compare.plan import Job, Settings
from pretrain.compare.result import Column, Spread
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
            run = replace(load("m3i.demo"), seed=seed)
            made.append(Job(variant, run, folder, (), {"scenes": ()}))
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
    (made[0].folder / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "collapsed": ["image_same"]}\n')
    return made


def settings(tmp_path: Path) -> Settings:
    return Settings({"scenes": tmp_path}, {"scenes": tmp_path}, {}, tmp_path, (0, 1))


def test_methods_stand_by_the_mean_of_their_probes(jobs: list[Job]) -> None:
    found = result.collect(jobs)
    assert list(found.methods) == ["m3i", "siamese_feature", "mim_feature", "classification", "untrained"]
    assert [column.title for column in found.columns] == ["scenes kNN", "scenes dense mIoU", "mean of probes"]
    assert found.methods["m3i"][Column("scenes", "knn")].values == (0.5, 0.7)
    assert found.methods["m3i"][Column("", "mean")].values == pytest.approx((0.45, 0.55))
    assert found.methods["untrained"][Column("scenes", "knn")].values == (0.12, 0.12)
    assert found.chance[Column("", "mean")] == pytest.approx(0.06)
    assert found.collapsed == {"m3i": ("image_same",)}


def test_the_spread_over_seeds_is_the_sample_deviation() -> None:
    assert Spread((0.5, 0.7)).text() == "60.0 ± 14.1"
    assert Spread((0.5,)).text() == "50.0" and math.isnan(Spread((0.5,)).deviation)
    assert Spread(()).text() == "-"


def test_the_order_is_compared_with_the_papers(jobs: list[Job], tmp_path: Path) -> None:
    found = result.collect(jobs)
    assert result.order_agreement(COMPARISON, found, "imagenet1k_top1") == (pytest.approx(1.0), 4)
    assert result.order_agreement(COMPARISON, result.collect(jobs[:4]), "imagenet1k_top1") is None


def test_the_table_has_a_line_a_method_and_says_how_many_seeds(jobs: list[Job], tmp_path: Path) -> None:
    text = result.table(COMPARISON, settings(tmp_path), jobs, result.collect(jobs))
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["m3i"] == "| m3i | 60.0 ± 14.1 | 40.0 ± 0.0 | 50.0 ± 7.1 | 2 of 2 | image_same |"
    assert lines["classification"].endswith("| 20.0 | 10.0 | 15.0 | 1 of 2 |  |")
    assert lines["chance"].startswith("| chance | 10.0 | 2.0 | 6.0 |")
    assert "Kendall's tau +1.00 over 4 methods" in text


def test_the_record_names_data_budget_and_code(jobs: list[Job], tmp_path: Path) -> None:
    record = result.record("m3i", COMPARISON, settings(tmp_path), jobs, result.collect(jobs))
    assert record["methods"]["m3i"]["scenes kNN"] == [0.5, 0.7]
    assert {"commit", "hardware", "date", "versions", "steps", "batch", "backbone", "seeds"} <= record.keys()
    assert json.loads(json.dumps(record)) == record


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
    bare = [replace(one, evaluations={"other": ()}) for one in jobs]
    assert result.collect(bare).methods == {}


def test_every_comparison_of_the_issue_is_there() -> None:
    sources = {comparison.source for comparison in COMPARISONS.values()}
    assert {"M3I, table 3", "M3I, table 4", "M3I, table 13", "M3I, table 14", "MVP, table 5"} <= sources
    assert "HVP-MTL, ablation" in sources
