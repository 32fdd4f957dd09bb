"""What did the methods reach? Every probe by method and seed, read from the evaluations that there are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import kendalltau

from pretrain.checkpoint import checkpoint_folder
from pretrain.compare.comparisons import Comparison
from pretrain.compare.plan import TRAIN, Job
from pretrain.compare.work import is_evaluated
from pretrain.monitor import LOG

UNTRAINED = "untrained"  # the networks as the runs of a seed begin, all alike
MEAN = "mean"  # over the probes that every method has
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


OVERALL = Column("", MEAN)


@dataclass(frozen=True)
class Spread:
    """One probe of one method: a number a seed, in [0, 1]."""

    of_seed: Mapping[int, float]

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(self.of_seed[seed] for seed in sorted(self.of_seed))

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


NOTHING = Spread({})


@dataclass(frozen=True)
class Found:
    """All that is measured of a comparison so far."""

    columns: tuple[Column, ...]  # the mean last
    in_mean: tuple[Column, ...]  # those that every method has
    methods: Mapping[str, Mapping[Column, Spread]]  # best mean first, untrained among them
    chance: Mapping[Column, float]
    collapsed: Mapping[
        str, tuple[str, ...]
    ]  # method -> targets that were collapsed at the end of any of its runs
    origins: Mapping[str, tuple[str, ...]]  # commit, hardware -> those of the runs

    def of(self, method: str, column: Column = OVERALL) -> Spread:
        """NOTHING where it is not measured."""
        return self.methods.get(method, {}).get(column, NOTHING)


def collect(jobs: Sequence[Job]) -> Found:
    """Reads the results that there are; methods without any are left out."""
    values: dict[str, dict[Column, dict[int, float]]] = {}
    chance: dict[Column, float] = {}
    for job in jobs:
        for column, method, row in _rows(job):
            values.setdefault(method, {}).setdefault(column, {}).setdefault(job.run.seed, row["accuracy"])
            chance.setdefault(column, row.get("chance", 0.0))
    columns = sorted(chance, key=lambda column: (column.set, list(PROBES).index(column.probe)))
    in_mean = tuple(c for c in columns if all(c in of_method for of_method in values.values()))
    for of_method in values.values():
        seeds = set.intersection(*(set(of_method[column]) for column in in_mean)) if in_mean else set()
        of_method[OVERALL] = {seed: fmean(of_method[c][seed] for c in in_mean) for seed in seeds}
    chance[OVERALL] = fmean(chance[column] for column in in_mean) if in_mean else 0.0
    methods = {
        method: {column: Spread(of_column) for column, of_column in of_method.items()}
        for method, of_method in values.items()
    }
    order = sorted(methods, key=lambda m: -(methods[m][OVERALL].mean if methods[m][OVERALL].values else -1.0))
    trained = [
        job for job in jobs if any(is_evaluated(job, task) for task in job.tasks if task.name != TRAIN)
    ]
    return Found(
        (*columns, OVERALL),
        in_mean,
        {method: methods[method] for method in order},
        chance,
        _collapsed(trained),
        {
            key: tuple(sorted({_state(job).get(key, "unknown") for job in trained}))
            for key in ("commit", "hardware")
        },
    )


def _rows(job: Job) -> Iterable[tuple[Column, str, Mapping[str, Any]]]:
    """(column, method, its row) of what was measured as it is asked now: trained, and untrained where that was
    evaluated too.
    """
    for task in job.tasks:
        if task.name == TRAIN or not is_evaluated(job, task):
            continue
        name = task.name
        checkpoints = json.loads(job.result(name).read_text())["checkpoints"]
        steps = sorted(checkpoints)
        of_methods = {job.variant.name: checkpoints[steps[-1]]}
        if len(steps) > 1:
            of_methods[UNTRAINED] = checkpoints[steps[0]]
        for method, rows in of_methods.items():
            for probe in PROBES:
                row = rows.get(probe) or {}
                if row.get("accuracy") is not None:
                    yield Column(name, probe), method, row


def _collapsed(jobs: Sequence[Job]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for job in jobs:
        lines = log_lines(job.folder)
        if lines and lines[-1].get("collapsed"):
            found.setdefault(job.variant.name, set()).update(lines[-1]["collapsed"])
    return {method: tuple(sorted(targets)) for method, targets in found.items()}


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log; one that a kill has torn is left out."""
    path = folder / LOG
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict):
            lines.append(told)
    return lines


def _state(job: Job) -> dict[str, Any]:
    """What the last checkpoint of a run says of its origin."""
    path = checkpoint_folder(job.folder, job.run.steps) / "state.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def order_agreement(comparison: Comparison, found: Found, number: str) -> tuple[float, int] | None:
    """Kendall's tau between the mean of the probes and what the paper measured, and the methods that have both.

    None with fewer than four of them.
    """
    pairs = [
        (found.of(variant.name).mean, variant.published[number])
        for variant in comparison.variants
        if number in variant.published and found.of(variant.name).values
    ]
    if len(pairs) < 4:
        return None
    return float(kendalltau(*zip(*pairs, strict=True)).statistic), len(pairs)
