"""What did the evaluation find? Accuracies before and after, and which categories are taken for which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pretrain.evaluate.rows import TITLES
from pretrain.report.record import Record
from pretrain.visualize.dumbbell import Measure, Move, dumbbells
from pretrain.visualize.markup import Html, element, figure, key, table
from pretrain.visualize.matrix import MAX_CELLS, accuracy_bars, confusion_matrix
from pretrain.visualize.numbers import percent

NUM_CONFUSED = 20  # pairs of categories listed when a matrix would be too large
NUM_ENDS = 15  # best and worst categories shown when there are too many for one chart


def moves(record: Record) -> list[Move]:
    """What each probe measured at the first and the newest evaluated checkpoint; unmeasured ones are left out."""
    checkpoints = record.evaluation.get("checkpoints") or {}
    steps = sorted(checkpoints)
    if not steps:
        return []
    first, last = checkpoints[steps[0]], checkpoints[steps[-1]]
    found = []
    for name in [*[n for n in TITLES if n in last], *[n for n in last if n not in TITLES]]:
        after = _measure(last[name])
        if after is None:
            continue
        before = _measure(first.get(name)) if len(steps) > 1 else None
        title = TITLES.get(name, name)
        found.append(Move(title, float(last[name]["chance"]), before, after))
    return found


def headline(record: Record) -> list[Move]:
    """The probes of the page's first lines: kNN, linear and zero-shot, when they were measured."""
    titles = [TITLES[name] for name in ("knn", "linear", "zero_shot")]
    return [move for move in moves(record) if move.title in titles] or moves(record)[:3]


def _measure(row: Mapping[str, Any] | None) -> Measure | None:
    if not isinstance(row, Mapping) or row.get("accuracy") is None:
        return None
    interval = row.get("interval")
    return Measure(float(row["accuracy"]), (float(interval[0]), float(interval[1])) if interval else None)


def accuracies(record: Record) -> Html | None:
    """The chart and the table of all probes; None without an evaluation."""
    found = moves(record)
    if not found:
        return None
    rows = [
        [
            move.title,
            percent(move.chance),
            _cell(move.before) if move.before else "–",
            _cell(move.after),
            f"{move.after.accuracy / move.chance:.1f} ×" if move.chance else "–",
            f"{move.after.accuracy / move.before.accuracy:.2f} ×"
            if move.before and move.before.accuracy
            else "–",
        ]
        for move in found
    ]
    head = ["held-out accuracy", "chance", "before", "after", "after / chance", "after / before"]
    signs = [("key-before", "before training"), ("key-after", "after"), ("key-chance", "chance")]
    legend = key(*signs, ("key-interval", "95 % interval"))
    return element("div", legend, dumbbells(found), table(head, rows, "numbers"), _unmeasured(record))


def _cell(measure: Measure) -> Html:
    if measure.interval is None:
        return element("span", percent(measure.accuracy), element("small", " no interval"))
    low, high = measure.interval
    interval = element("small", f" [{100 * low:.1f}, {100 * high:.1f}]")
    return element("span", percent(measure.accuracy), interval)


def _unmeasured(record: Record) -> Html | None:
    last = record.evaluation["checkpoints"][max(record.evaluation["checkpoints"])]
    reasons = [
        f"{TITLES.get(name, name)}: {row['reason']}"
        for name, row in last.items()
        if isinstance(row, Mapping) and row.get("accuracy", 0) is None and row.get("reason")
    ]
    return element("p", "Not measured — " + "; ".join(reasons) + ".", class_="note") if reasons else None


def confusion(record: Record) -> Html | None:
    """The matrix and the bars of every category; lists instead of them beyond MAX_CELLS; None without counts."""
    found = record.evaluation.get("confusion")
    categories = record.evaluation.get("categories") or []
    if not found or not found.get("counts") or len(found["counts"]) != len(categories):
        return None
    counts = np.array(found["counts"], dtype=np.int64)
    num_images = counts.sum(axis=1)
    shown = [k for k in range(len(categories)) if num_images[k]]
    accuracy = counts.diagonal() / np.maximum(num_images, 1)
    step = int(str(found.get("checkpoint", "step_0")).rpartition("_")[2] or 0)
    origin = f"by the {found.get('probe', 'linear')} probe after {step:,} steps"
    if len(categories) <= MAX_CELLS:
        left = figure(
            confusion_matrix(counts, categories),
            f"Rows are true categories, columns what they were taken for {origin}. Shade is the share of the row.",
            "wide",
        )
    else:
        left = element("div", element("h3", "Most frequent confusions"), _most_confused(counts, categories))
        by_accuracy = sorted(shown, key=lambda k: -accuracy[k])
        ends = (
            [*by_accuracy[:NUM_ENDS], *by_accuracy[-NUM_ENDS:]] if len(shown) > 2 * NUM_ENDS else by_accuracy
        )
        shown = list(dict.fromkeys(ends))
    bars = accuracy_bars(
        [float(accuracy[k]) for k in shown],
        [int(num_images[k]) for k in shown],
        [categories[k] for k in shown],
        1 / len(categories),
    )
    title = "Accuracy by category" if len(categories) <= MAX_CELLS else "Best and worst categories"
    right = figure(bars, f"{title}, {origin}; the dashed line is chance.", "wide")
    return element("div", left, right, class_="confusion")


def _most_confused(counts: np.ndarray, categories: list[str]) -> Html:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    places = np.argsort(-wrong, axis=None, kind="stable")[:NUM_CONFUSED]
    pairs = [np.unravel_index(place, wrong.shape) for place in places]
    rows = [
        [
            categories[true],
            categories[said],
            int(wrong[true, said]),
            percent(wrong[true, said] / max(counts[true].sum(), 1), 0),
        ]
        for true, said in pairs
        if wrong[true, said]
    ]
    return table(["true", "taken for", "images", "of its images"], rows, "numbers")
