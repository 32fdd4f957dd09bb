"""What did the methods reach? Every probe by method with its spread over seeds, as JSON and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.stats import kendalltau

from pretrain import provenance
from pretrain.compare.comparisons import Comparison
from pretrain.compare.plan import Job, Settings

UNTRAINED = "untrained"  # the networks as the runs of the first method begin
MEAN = "mean"  # over all probes that every method has
PROBES = {"knn": "kNN", "linear": "linear", "dense": "dense mIoU", "fine_tune": "fine-tuned"}


@dataclass(frozen=True)
class Column:
    """One number of the table."""

    set: str  # evaluation set; "" for the mean
    probe: str

    @property
    def title(self) -> str:
        return (
            f"{self.set} {PROBES[self.probe]}".strip() if self.probe in PROBES else f"{self.probe} of probes"
        )


@dataclass(frozen=True)
class Spread:
    """One probe of one method: a number a seed, in [0, 1]."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds (n - 1); nan for a single one."""
        return stdev(self.values) if len(self.values) > 1 else math.nan

    def text(self) -> str:
        """In per cent: mean and deviation, `-` where nothing was measured."""
        if not self.values:
            return "-"
        spread = "" if math.isnan(self.deviation) else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


@dataclass(frozen=True)
class Found:
    """All that is measured of a comparison so far."""

    columns: tuple[Column, ...]
    methods: dict[str, dict[Column, Spread]]  # best mean first, untrained among them
    chance: dict[Column, float]
    collapsed: dict[str, tuple[str, ...]]  # method -> targets that collapsed in any of its runs


def collect(jobs: Sequence[Job]) -> Found:
    """Reads the results that there are; methods without any are left out."""
    values: dict[str, dict[Column, list[float]]] = {}
    chance: dict[Column, float] = {}
    collapsed: dict[str, set[str]] = {}
    for job in jobs:
        for name in job.evaluations:
            for method, rows in _methods_of(job, name):
                for probe in PROBES:
                    row = rows.get(probe) or {}
                    if row.get("accuracy") is None:
                        continue
                    column = Column(name, probe)
                    values.setdefault(method, {}).setdefault(column, []).append(row["accuracy"])
                    chance.setdefault(column, row.get("chance", 0.0))
        collapsed.setdefault(job.variant.name, set()).update(_collapsed(job.folder / "log.jsonl"))
    columns = [c for c in chance if all(c in of_method for of_method in values.values())]
    columns.sort(key=lambda column: (column.set, list(PROBES).index(column.probe)))
    mean = Column("", MEAN)
    for of_method in values.values():
        seeds = min(len(of_method[column]) for column in columns) if columns else 0
        of_method[mean] = [fmean(of_method[column][seed] for column in columns) for seed in range(seeds)]
    chance[mean] = fmean(chance[column] for column in columns) if columns else 0.0
    methods = {
        method: {column: Spread(tuple(of_method.get(column, ()))) for column in (*columns, mean)}
        for method, of_method in values.items()
    }
    order = sorted(methods, key=lambda m: -(methods[m][mean].mean if methods[m][mean].values else -1.0))
    return Found(
        (*columns, mean),
        {method: methods[method] for method in order},
        chance,
        {method: tuple(sorted(targets)) for method, targets in collapsed.items() if targets},
    )


def _methods_of(job: Job, name: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(method, its rows) of one evaluation: the trained one, and the untrained where it was evaluated."""
    path = job.result(name)
    if not path.is_file():
        return
    checkpoints = json.loads(path.read_text())["checkpoints"]
    steps = sorted(checkpoints)
    yield job.variant.name, checkpoints[steps[-1]]
    if len(steps) > 1:
        yield UNTRAINED, checkpoints[steps[0]]


def _collapsed(log: Path) -> list[str]:
    """Targets that the last line of a run's log calls collapsed."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1]).get("collapsed", []) if lines else []


def order_agreement(comparison: Comparison, found: Found, number: str) -> tuple[float, int] | None:
    """Kendall's tau between the mean of the probes and what the paper measured, and the methods that have both.

    None with fewer than four of them.
    """
    mean = found.columns[-1]
    pairs = [
        (found.methods[variant.name][mean].mean, variant.published[number])
        for variant in comparison.variants
        if number in variant.published and found.methods.get(variant.name, {}).get(mean, Spread(())).values
    ]
    if len(pairs) < 4:
        return None
    return float(kendalltau(*zip(*pairs, strict=True)).statistic), len(pairs)


def record(
    name: str, comparison: Comparison, settings: Settings, jobs: Sequence[Job], found: Found
) -> dict[str, Any]:
    """The whole comparison as JSON types: what was measured, on what, by which code."""
    run = jobs[0].run
    return {
        "comparison": name,
        "source": comparison.source,
        "about": comparison.about,
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backbone": run.backbone.size,
        "steps": run.steps,
        "batch": run.batch,
        "image_size": run.views.size,
        "seeds": list(settings.seeds),
        "fine_tune_epochs": settings.fine_tune,
        "data": sorted(settings.data),
        "chance": {column.title: found.chance[column] for column in found.columns},
        "methods": {
            method: {column.title: list(spread.values) for column, spread in of_method.items()}
            for method, of_method in found.methods.items()
        },
        "published": {v.name: v.published for v in comparison.variants if v.published},
        "order_agreement": {
            number: list(told)
            for number in sorted({key for v in comparison.variants for key in v.published})
            if (told := order_agreement(comparison, found, number)) is not None
        },
        "collapsed": {method: list(targets) for method, targets in found.collapsed.items()},
    }


def table(comparison: Comparison, settings: Settings, jobs: Sequence[Job], found: Found) -> str:
    """Markdown: a method a line, best mean of probes first."""
    run, total = jobs[0].run, len(settings.seeds)
    head = ["method", *(column.title for column in found.columns), "seeds", "collapsed targets"]
    lines = [
        f"# {comparison.about[0].upper()}{comparison.about[1:]}",
        "",
        f"{comparison.source or 'Ours'}. {run.backbone.size}, {run.views.size} px, {run.steps} steps of {run.batch} "
        f"images of {', '.join(sorted(settings.data))}; the momentum teacher, held-out, %, mean ± standard deviation "
        "over seeds.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        _line("chance", [f"{100 * found.chance[column]:.1f}" for column in found.columns], "", ""),
    ]
    for method, of_method in found.methods.items():
        seeds = len(of_method[found.columns[-1]].values)
        cells = [of_method[column].text() for column in found.columns]
        lines.append(_line(method, cells, f"{seeds} of {total}", ", ".join(found.collapsed.get(method, ()))))
    for number in sorted({key for v in comparison.variants for key in v.published}):
        if (told := order_agreement(comparison, found, number)) is not None:
            tau, count = told
            lines += [
                "",
                f"Order against the paper's {number}: Kendall's tau {tau:+.2f} over {count} methods.",
            ]
    return "\n".join(lines) + "\n"


def _line(*cells: str | list[str]) -> str:
    flat = [one for cell in cells for one in (cell if isinstance(cell, list) else [cell])]
    return "| " + " | ".join(flat) + " |"
