"""Does pre-training help in every protocol? Runs of several seeds on held-out scenes, before and after.

    python -m data_prep build scenes --out data/few --count 480 --seed 3
    python -m data_prep build scenes --out data/held --count 2200 --seed 21 --heldout 0.91
    OMP_NUM_THREADS=1 python benchmarks/transfer.py runs/seed0 runs/seed1 runs/seed2 --train data/few/train \
        --heldout data/held/heldout

The runs differ in `--seed`. Every protocol of pretrain.evaluate reads both checkpoints of a run, the first and the
last. A protocol gains clearly if in every run the 95 % interval after lies above that before. Writes
results/transfer.json and results/transfer.md.

`--only few_shot_1_fine_tune,fine_tune` measures some rows; the others stay as recorded, each with its commit and day.
That they are of the same checkpoints and data is seen by kNN, which is measured again and must say the same.

The recipe of few labels was chosen by the pre-trained checkpoint of seed 0 alone, on the 500 scenes that its own data
holds out, with draw 3 (the rows have 0, 1 and 2) and 50 to 100 updates. On 1 % of the labels crops of half the image
at least gave 21 to 26 %, whatever the rate (`base_lr` from 1e-3 to 4e-2); with a head 10 to 100 times as fast 26 to
29 %, and 45 on 10 %. Crops of 0.8 at least gave, at 1e-3, 30.8 and 37.2 % on 1 and 10 %, with the head 10 times as
fast 36.6 and 50.4, 20 times 36.0 and 53.4, and 33.0 on 1 % after 120 updates; at 4e-3 and 20 times 26.8 and 45.6.
Crops of 0.9: at 5e-4 and 20 times 40.0 and 49.4, after 120 updates 40.0 and 53.4; at 1e-3, as chosen, 38.8 and 52.6
(36.8 and 51.6 with draw 4). The linear probe had 36.8 and 49.8 (33.6 and 47.0).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.record import RESULTS, is_clear, keep, measured_on, read_record, shown
from data_prep.files import write_atomic
from pretrain import provenance
from pretrain.evaluate.asked import Protocols
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.evaluate.fine_tune_recipes import FEW, FROZEN, RECIPES
from pretrain.evaluate.protocols import best_device, evaluate_checkpoint
from pretrain.evaluate.rows import PROBES, TITLES, tuned_row

STEPS = ("first", "last")  # checkpoints of a run
RECIPE = "small"  # of fine-tuning, on all labels and on few
SAME = "knn"  # the row by which checkpoints and data of two measurements are seen to be the same
RETRIEVAL_IMAGES = 1000  # that compete, as many as Flickr30k tests with; others give another recall


def summary(runs: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By protocol: chance, mean and deviation over the runs before and after, and whether every run gains clearly."""
    found = {}
    for name in TITLES:
        if not all(name in run[step] for run in runs for step in STEPS):
            continue
        pairs = [(run["first"][name], run["last"][name]) for run in runs]
        if any(row["accuracy"] is None for pair in pairs for row in pair):
            continue
        before, after = ([row["accuracy"] for row in rows] for rows in zip(*pairs, strict=True))
        found[name] = {
            "n": pairs[0][1]["n"],
            "chance": pairs[0][1]["chance"],
            "before": [mean(before), stdev(before) if len(before) > 1 else 0.0],
            "after": [mean(after), stdev(after) if len(after) > 1 else 0.0],
            "is_clear": all(is_clear(first, last) for first, last in pairs),
            "commits": sorted({row["commit"] for pair in pairs for row in pair}),
            "dates": sorted({row["date"] for pair in pairs for row in pair}),
        }
    return found


def table(record: dict[str, Any]) -> str:
    """Of what is kept of the runs."""
    runs = record["runs"]
    found, seeds = summary(runs), ", ".join(str(run["seed"]) for run in runs)
    lines = [
        f"Held-out scenes, % (mean and standard deviation of {len(runs)} runs of {runs[0]['recipe']},",
        f"{runs[0]['steps']} steps, seeds {seeds}); n: images or captions that are judged; clear: in every run the",
        "95 % interval after lies above that before; commit: of the code that measured.",
        measured_on(record, [date for row in found.values() for date in row["dates"]]),
        "",
        "| protocol | n | chance | untrained | pre-trained | clear | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        cells = [f"{100 * m:.1f} ± {100 * d:.1f}" for m, d in (row["before"], row["after"])]
        clear = "yes" if row["is_clear"] else "no"
        counted = f"{row['n']:,} | {100 * row['chance']:.1f}"
        told = [TITLES[name], counted, *cells, clear, shown(row["commits"])]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def claim(found: dict[str, dict[str, Any]], seeds: list[int]) -> str:
    """What the numbers say, and of how many runs."""
    unclear = [TITLES[name] for name, row in found.items() if not row["is_clear"]]
    told = f"pre-trained clearly beats untrained on held-out scenes in {len(found) - len(unclear)} of {len(found)} "
    told += f"protocols, in each of the runs with seeds {', '.join(map(str, seeds))}"
    return told + (f"; not in: {', '.join(unclear)}" if unclear else "")


def protocols_of(only: Sequence[str] = ()) -> Protocols:
    """All rows, or some of them and kNN."""
    asked = {SAME, *only} if only else TITLES.keys()
    if unknown := sorted(set(asked) - TITLES.keys()):
        raise ValueError(f"--only {','.join(unknown)}: choose from {', '.join(TITLES)}")
    few = {share: recipe for share, recipe in FEW[RECIPE].items() if tuned_row(share) in asked}
    return Protocols(
        probes=tuple(name for name in PROBES if name in asked),
        frozen=tuple(name for name in FROZEN if name in asked),
        fine_tune=RECIPES[RECIPE] if "fine_tune" in asked else None,
        fine_tune_few=few,
        retrieval_images=RETRIEVAL_IMAGES,
    )


def measured(folder: Path, train: Path, heldout: Path, protocols: Protocols) -> dict[str, Any]:
    """A run as it stands in the record; every row has its commit and day."""
    recipe = json.loads((folder / "recipe.json").read_text())
    found = {"seed": recipe["seed"], "steps": recipe["steps"], "recipe": recipe["name"]}
    for step in STEPS:
        rows = evaluate_checkpoint(find_checkpoint(folder, step), train, heldout, protocols)
        told = {
            "commit": provenance.commit() or "unknown",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        found[step] = {name: row | (told if name in TITLES else {}) for name, row in rows.items()}
    return found


def recorded() -> list[dict[str, Any]]:
    """Runs of the record. ValueError where it is of another machine or other versions than these."""
    record = read_record("transfer")
    here = {
        "hardware": provenance.hardware(best_device()),
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(),
    }
    if differing := [key for key, value in here.items() if record[key] != value]:
        raise ValueError(
            f"the record is of other {' and '.join(differing)}: measure all rows, without --only"
        )
    return record["runs"]


def joined(earlier: list[dict[str, Any]], now: dict[str, Any], only: Sequence[str]) -> list[dict[str, Any]]:
    """Runs of a record, of which the one of the same seed has the rows `only` as measured now.

    ValueError where that is another run, or was measured on other data.
    """
    same = [run for run in earlier if run["seed"] == now["seed"]]
    facts = ("steps", "recipe")
    if not same or any(same[0][fact] != now[fact] for fact in facts):
        raise ValueError(f"the record has no run of seed {now['seed']} like this one: measure without --only")
    for step in STEPS:
        if same[0][step][SAME]["by_k"] != now[step][SAME]["by_k"]:
            raise ValueError(
                f"kNN of seed {now['seed']}, {step}, is not the recorded one: the run or the data are others, "
                "measure all rows, without --only"
            )
    fresh = {step: same[0][step] | {name: now[step][name] for name in only} for step in STEPS}
    return [run | fresh if run is same[0] else run for run in earlier]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--train", type=Path, required=True, help="data set that teaches the probes")
    parser.add_argument("--heldout", type=Path, required=True, help="data set that tests them")
    parser.add_argument(
        "--only", default="", help="rows to measure, with commas; the others stay as recorded"
    )
    options = parser.parse_args()
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    protocols = protocols_of(only)
    runs = recorded() if only else []
    for folder in options.runs:
        run = without_trials(measured(folder, options.train, options.heldout, protocols))
        runs = joined(runs, run, only) if only else [*runs, run]
        write(runs)  # as far as it is known: the rest takes minutes


def write(runs: list[dict[str, Any]]) -> None:
    """The table on the console, and both files."""
    found = summary(runs)
    keep(
        "transfer",
        claim(found, [run["seed"] for run in runs]),
        best_device(),
        summary=found,
        runs=runs,
    )
    told = table(read_record("transfer"))
    print(told, flush=True)
    write_atomic(RESULTS / "transfer.md", told.encode())


def without_trials(run: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the record compares: not every head that was tried, nor the 80 prompts."""
    left_out = ("tried", "prompts", "iou")
    shorter = {
        step: {name: {k: v for k, v in row.items() if k not in left_out} for name, row in run[step].items()}
        for step in STEPS
    }
    return run | shorter


if __name__ == "__main__":
    main()
