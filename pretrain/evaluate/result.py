"""What is written down of an evaluation, and how is it shown?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data_prep.files import write_atomic
from data_prep.schema import Manifest
from pretrain import provenance, strict_json
from pretrain.collectives import all_rows
from pretrain.config import Run
from pretrain.evaluate.accuracy import confusion_counts
from pretrain.evaluate.divided import division
from pretrain.evaluate.evidence import Evidence, Outcome, heldout_labels, not_finite
from pretrain.evaluate.knn import nearest_of_all
from pretrain.evaluate.rows import TITLES
from pretrain.evaluate.sets import Listing, sha256_of

CONFUSION_OF = "linear"  # the probe whose mistakes are counted by category
NUM_QUERIES = 12  # held-out images whose neighbours are listed
NUM_NEIGHBOURS = 6


def header(run: Run, data: Mapping[str, Any], categories: Sequence[str], device: str) -> dict[str, Any]:
    """What the numbers were measured on: data, recipe, commit, hardware, date."""
    return {
        "data": data,
        "recipe": run.name,
        "image_size": run.views.size,
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "hardware": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "categories": list(categories),
    }


def data_of(
    folders: Mapping[str, Path], manifests: Mapping[str, Manifest | Listing]
) -> dict[str, dict[str, Any]]:
    """Which images taught and tested, by split."""
    return {
        split: {
            "folder": str(folders[split]),
            "name": manifest.name,
            "split": manifest.split,
            "num_samples": manifest.num_samples,
            "sha256": sha256_of(folders[split]),
        }
        for split, manifest in manifests.items()
    }


def of_checkpoint(evidence: Evidence, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The record of one checkpoint: a row a probe and the samples left out."""
    rows = {name: outcome.record for name, outcome in outcomes.items()}
    return rows | {"dropped": {"train": evidence.train.dropped, "heldout": evidence.heldout.dropped}}


def confusion(step: str, evidence: Evidence, outcomes: Mapping[str, Outcome]) -> dict[str, Any] | None:
    """Counts by true (row) and predicted (column) category; None without categories or that probe.

    A collective call.
    """
    predicted = outcomes[CONFUSION_OF].predicted if CONFUSION_OF in outcomes else None
    if predicted is None:
        return None
    labels = heldout_labels(evidence)
    counts = confusion_counts(predicted, labels, len(evidence.categories))
    return {"checkpoint": step, "probe": CONFUSION_OF, "counts": counts.tolist()}


def neighbours(step: str, evidence: Evidence) -> dict[str, Any]:
    """The nearest training images of held-out images spread over the set, by sample numbers of the data sets; of none
    where features are not finite, to which nothing is near.

    A collective call.
    """
    if not_finite(evidence):
        return {"checkpoint": step, "feature": "tokens", "queries": []}
    train, heldout = evidence.train, evidence.heldout
    divided = division(len(heldout.index))
    num_queries = min(NUM_QUERIES, divided.total)
    rows = divided.own(torch.linspace(0, divided.total - 1, num_queries).round().long())
    numbers, labels = (all_rows(values) for values in (train.index, train.labels))
    found = nearest_of_all(train.tokens, heldout.tokens[rows], min(NUM_NEIGHBOURS, len(numbers)))
    of_query = (heldout.index[rows], heldout.labels[rows], *found)
    queries = [
        {
            "heldout": int(index),
            "label": int(label),
            "train": numbers[near].tolist(),
            "train_labels": labels[near].tolist(),
            "similarity": [round(value, 4) for value in similar.tolist()],
        }
        for index, label, similar, near in zip(*map(all_rows, of_query), strict=True)
    ]
    return {"checkpoint": step, "feature": "tokens", "queries": queries}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """The result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (strict_json.dumps(result, indent=1) + "\n").encode())


def set_aside(
    path: Path, names: Collection[str], probes: Collection[str], data: Mapping[str, Any]
) -> Path | None:
    """Renames the result at `path` if it is of other data, or has rows that these checkpoints and probes would not
    have; the new path. ValueError as `rows_there`.
    """
    data_there, rows = rows_there(path)
    if not rows or (data_there == data and rows <= {(name, probe) for name in names for probe in probes}):
        return None
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    kept = path.with_name(f"{path.stem}.{written:%Y%m%dT%H%M%S}{path.suffix}")
    path.rename(kept)
    return kept


def rows_there(path: Path) -> tuple[Any, set[tuple[str, str]]]:
    """The data of the result at `path` and its rows, by checkpoint and probe; no rows without a file.

    ValueError for a file that is no result.
    """
    if not path.exists():
        return None, set()
    try:
        there = strict_json.loads(path.read_text())
        rows = {
            (name, probe)
            for name, measured in there["checkpoints"].items()
            for probe in measured
            if probe in TITLES
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--out {path} is there and is no result of an evaluation: name another file, or remove that one"
        ) from error
    return there.get("data"), rows


def table(result: Mapping[str, Any]) -> str:
    """The accuracies of all checkpoints side by side, in per cent with their 95 % intervals."""
    steps = list(result["checkpoints"])
    lines = [f"{'held-out accuracy, %':32}{'chance':>8}" + "".join(f"{step:>24}" for step in steps)]
    notes = []
    measured = [name for name in TITLES if any(name in result["checkpoints"][step] for step in steps)]
    for name in measured:
        rows = [result["checkpoints"][step][name] for step in steps]
        chance = next((row["chance"] for row in rows if row["accuracy"] is not None), None)
        shown = "-" if chance is None else f"{100 * chance:.1f}"
        lines.append(f"{TITLES[name]:32}{shown:>8}" + "".join(f"{_cell(row):>24}" for row in rows))
        notes += [
            f"{TITLES[name]}, {step}: {told}"
            for step, row in zip(steps, rows, strict=True)
            if (told := _others(row))
        ]
        notes += {f"{TITLES[name]}: not measured, {row['reason']}" for row in rows if row["accuracy"] is None}
    return "\n".join(lines + notes + left_out(result))


def left_out(result: Mapping[str, Any]) -> list[str]:
    """A line for each set of which images could not be read, by checkpoint where they differ."""
    told: dict[str, list[str]] = {}
    for step, measured in result["checkpoints"].items():
        for split, counts in measured.get("dropped", {}).items():
            if counts:
                reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
                line = f"{sum(counts.values())} images of the {split} set are left out ({reasons})"
                told.setdefault(line, []).append(step)
    return [f"{', '.join(steps)}: {line}" for line, steps in told.items()]


def require_measured(result: Mapping[str, Any], out: Path) -> None:
    """ValueError where no row of any checkpoint has a number."""
    rows = [
        (TITLES[name], row)
        for measured in result["checkpoints"].values()
        for name, row in measured.items()
        if name in TITLES
    ]
    numbers = [one for _, row in rows for one in (row, *row.get("by_k", {}).values())]
    if all(one["accuracy"] is None for one in numbers):
        reasons = "; ".join(dict.fromkeys(f"{title}: {row['reason']}" for title, row in rows))
        raise ValueError(
            f"nothing of what was asked could be measured ({reasons}), as {out} says: ask for other --probes, or "
            "mend what the reasons name"
        )


def _cell(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return "-"
    bounds = ", ".join(f"{100 * bound:.1f}" for bound in row["interval"] or ())
    return f"{100 * row['accuracy']:.1f}" + f" [{bounds}]" * bool(bounds)


def _others(row: Mapping[str, Any]) -> str:
    """What a row holds beside its headline: other numbers of neighbours, recall among more, in per cent."""
    told = [row["no_interval"]] if "no_interval" in row else []
    for sign, name in (("k = ", "by_k"), ("R@", "recall")):
        for number, other in list(row.get(name, {}).items())[1:]:
            told.append(f"{sign}{number} {_percent(other['accuracy'])}" + _why(other))
    images, captioned, galleries = (row.get(name, 0) for name in ("images", "captioned_images", "galleries"))
    if images < captioned or galleries > 1:
        some = f"the first {images:,} of {captioned:,}" if images < captioned else f"{images:,}"
        told.append(f"{some} images with captions, {images // galleries:,} compete (--retrieval-images)")
    share, drawn = row.get("share"), row.get("drawn_share", 0.0)
    if share and round(100 * drawn) != round(100 * share):
        told.append(f"one image a category at least, so {100 * drawn:.1f} % of the labels")
    return ", ".join(told)


def _why(row: Mapping[str, Any]) -> str:
    return f" ({row['reason']})" if row["accuracy"] is None else ""


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.1f}"
