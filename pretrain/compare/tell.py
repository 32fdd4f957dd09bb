"""How is a comparison told? As a record of JSON types, a Markdown table and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pretrain import provenance
from pretrain.compare.comparisons import Comparison
from pretrain.compare.plan import TRAIN, Job, Settings
from pretrain.compare.result import UNTRAINED, Found, Spread, order_agreement
from pretrain.objective import LABELS, Objective
from pretrain.resume import differences
from pretrain.visualize.dots import Dot, Panel, dot_panels

METHOD = ("run.name", "run.objective", "run.data", "run.mask", "run.seed")  # what a method is, beside changes


def passes(objective: Objective) -> tuple[float, float]:
    """Images that student and teacher encode for one image of the batch: what a step costs differs by method."""
    mixed, views = objective.input.mixed, objective.input.views
    taught = {
        (target.view, slot)
        for target in objective.targets.values()
        if target.encoder == "ema"
        for slot in objective.slots(target)
    }
    return views / mixed, views * len(taught) / mixed


def changes(job: Job, first: Job) -> dict[str, Any]:
    """Fields of a recipe that differ from the first method's although they are no part of the method."""
    old, new = ({"run": json.loads(one.run.to_json())} for one in (first, job))
    return {
        name.removeprefix("run."): value
        for name, _, value in differences(old, new)
        if not name.startswith(METHOD)
    }


def record(
    name: str, comparison: Comparison, settings: Settings, jobs: Sequence[Job], found: Found
) -> dict[str, Any]:
    """What was measured, on what, by which code."""
    first = jobs[0]
    of_method = {job.variant.name: job for job in reversed(jobs)}
    return {
        "comparison": name,
        "source": comparison.source,
        "about": comparison.about,
        "commits": list(found.origins["commit"]),
        "hardware": list(found.origins["hardware"]),
        "versions": provenance.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backbone": first.run.backbone.size,
        "steps": first.run.steps,
        "batch": first.run.batch,
        "image_size": first.run.views.size,
        "seeds": list(settings.seeds),
        "asked": {task.name: task.asked for task in first.tasks if task.name != TRAIN},
        "data": next(task.asked["data"] for task in first.tasks if task.name == TRAIN),
        "chance": {column.title: found.chance[column] for column in found.columns},
        "in_mean": [column.title for column in found.in_mean],
        "methods": {
            method: {
                column.title: dict(spread.of_seed) for column in found.columns if (spread := row.get(column))
            }
            for method, row in found.methods.items()
        },
        "labels": {
            method: {name: source.supervision for name, source in job.run.data.items()}
            for method, job in of_method.items()
        },
        "gamma": {method: job.run.objective.gamma for method, job in of_method.items()},
        "encoder_passes": {method: list(passes(job.run.objective)) for method, job in of_method.items()},
        "changes": {method: told for method, job in of_method.items() if (told := changes(job, first))},
        "published": {v.name: v.published for v in comparison.variants if v.published},
        "order_agreement": {
            number: list(told)
            for number in _numbers(comparison)
            if (told := order_agreement(comparison, found, number)) is not None
        },
        "collapsed": {method: list(targets) for method, targets in found.collapsed.items()},
    }


def _numbers(comparison: Comparison) -> list[str]:
    return sorted({number for variant in comparison.variants for number in variant.published})


def table(comparison: Comparison, settings: Settings, jobs: Sequence[Job], found: Found) -> str:
    """Markdown: a method a line, best mean of probes first, and below it what must be known to read it."""
    run, total = jobs[0].run, len(settings.seeds)
    of_method = {job.variant.name: job for job in reversed(jobs)}
    titles = [column.title for column in found.columns]
    head = ["method", *titles, "seeds", "encoder passes", "collapsed targets"]
    lines = [
        f"# {comparison.about[0].upper()}{comparison.about[1:]}",
        "",
        f"{comparison.source or 'Ours'}. {run.backbone.size}, {run.views.size} px, {run.steps} steps of {run.batch} "
        f"images of {', '.join(sorted(settings.data))}; the momentum teacher, held-out, %, mean ± standard deviation "
        "over seeds; images that student + teacher encode for one of the batch.",
        "",
        _line(head),
        "|" + "---|" * len(head),
        _line(["chance", *(f"{100 * found.chance[column]:.1f}" for column in found.columns), "", "", ""]),
    ]
    for method in found.methods:
        cells = [found.of(method, column).text() for column in found.columns]
        student, teacher = passes(of_method[method].run.objective) if method in of_method else (0, 0)
        cost = f"{student:g} + {teacher:g}" if method != UNTRAINED else ""
        told = ", ".join(found.collapsed.get(method, ()))
        lines.append(_line([method, *cells, f"{len(found.of(method).values)} of {total}", cost, told]))
    return "\n".join([*lines, *_notes(comparison, found, jobs, of_method)]) + "\n"


def _notes(
    comparison: Comparison, found: Found, jobs: Sequence[Job], of_method: Mapping[str, Job]
) -> list[str]:
    lines = []
    if left_out := [column.title for column in found.columns[:-1] if column not in found.in_mean]:
        lines.append(f"Not in the mean, since a method lacks it: {', '.join(left_out)}.")
    gammas = sorted({g for job in of_method.values() if (g := job.run.objective.gamma) not in (None, 1.0)})
    if gammas:
        lines.append(
            f"Gamma of the recipes with both kinds of losses: {', '.join(f'{g:g}' for g in gammas)}."
        )
    for method, job in of_method.items():
        if told := changes(job, jobs[0]):
            fields = ", ".join(f"{name}={value}" for name, value in told.items())
            lines.append(f"{method} differs in {fields}.")
        kinds = {target.kind for target in job.run.objective.targets.values()} & set(LABELS)
        given = {source.supervision for source in job.run.data.values()}
        if without := sorted(kinds - given):
            lines.append(
                f"{method} is trained without its {' and '.join(without)} targets: no data set gives it these labels."
            )
    if len(found.origins["commit"]) > 1:
        lines.append(f"Runs of several commits: {', '.join(found.origins['commit'])}.")
    for number in _numbers(comparison):
        if (told := order_agreement(comparison, found, number)) is not None:
            tau, count = told
            lines.append(
                f"Order against the paper's {number}: Kendall's tau {tau:+.2f} over {count} methods."
            )
    return [part for line in lines for part in ("", line)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def figure(comparison: Comparison, found: Found) -> str:
    """An SVG file: a panel a probe; rows of M3I itself are marked."""
    names = list(found.methods)
    panels = [
        Panel(column.title, found.chance[column], tuple(_dot(found.of(name, column)) for name in names))
        for column in found.columns
    ]
    return dot_panels(names, panels, [v.name for v in comparison.variants if v.row == "m3i"])


def _dot(spread: Spread) -> Dot | None:
    return Dot(spread.mean, spread.deviation, spread.values) if spread.values else None
