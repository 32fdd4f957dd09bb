"""Does pre-training help in every protocol? Runs of several seeds on held-out scenes, before and after.

    python -m data_prep build scenes --out data/few --count 480 --seed 3
    python -m data_prep build scenes --out data/held --count 2200 --seed 21 --heldout 0.91
    OMP_NUM_THREADS=1 python benchmarks/transfer.py runs/seed0 runs/seed1 runs/seed2 --train data/few/train \
        --heldout data/held/heldout

The runs differ in `--seed`. Every protocol of pretrain.evaluate reads both checkpoints of a run, the first and the
last; fine-tuning sees the training images --epochs times. A protocol gains clearly if in every run the 95 % interval
after lies above that before. Writes results/transfer.json and results/transfer.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import RESULTS, keep
from data_prep.schema import write_atomic
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.evaluate.fine_tune_recipes import FROZEN, RECIPES
from pretrain.evaluate.probes import ALL, TITLES
from pretrain.evaluate.protocols import Protocols, best_device, evaluate_checkpoint

RETRIEVAL_IMAGES = 1000  # that compete, as many as Flickr30k tests with; others give another recall


def summary(runs: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By protocol: chance, mean and deviation over the runs before and after, and whether every run gains clearly."""
    found = {}
    for name in runs[0]["first"]:
        pairs = [(run["first"][name], run["last"][name]) for run in runs if name != "dropped"]
        if not pairs or any(row["accuracy"] is None for pair in pairs for row in pair):
            continue
        before, after = ([row["accuracy"] for row in rows] for rows in zip(*pairs, strict=True))
        found[name] = {
            "n": pairs[0][1]["n"],
            "chance": pairs[0][1]["chance"],
            "before": [mean(before), stdev(before) if len(before) > 1 else 0.0],
            "after": [mean(after), stdev(after) if len(after) > 1 else 0.0],
            "is_clear": all(last["interval"][0] > first["interval"][1] for first, last in pairs),
        }
    return found


def table(found: dict[str, dict[str, Any]], num_runs: int) -> str:
    lines = [
        f"Held-out scenes, % (mean and standard deviation of {num_runs} runs); n: images or captions",
        "that are judged; clear: in every run the 95 % interval after lies above that before.",
        "",
        "| protocol | n | chance | untrained | pre-trained | clear |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        cells = [f"{100 * m:.1f} ± {100 * d:.1f}" for m, d in (row["before"], row["after"])]
        clear = "yes" if row["is_clear"] else "no"
        counted = f"{row['n']:,} | {100 * row['chance']:.1f}"
        lines.append(f"| {TITLES[name]} | {counted} | {cells[0]} | {cells[1]} | {clear} |")
    return "\n".join(lines) + "\n"


def claim(found: dict[str, dict[str, Any]], seeds: list[int]) -> str:
    """What the numbers say, and of how many runs."""
    unclear = [TITLES[name] for name, row in found.items() if not row["is_clear"]]
    told = f"pre-trained clearly beats untrained on held-out scenes in {len(found) - len(unclear)} of {len(found)} "
    told += f"protocols, in each of the runs with seeds {', '.join(map(str, seeds))}"
    return told + (f"; not in: {', '.join(unclear)}" if unclear else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--train", type=Path, required=True, help="data set that teaches the probes")
    parser.add_argument("--heldout", type=Path, required=True, help="data set that tests them")
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning (%(default)s)")
    options = parser.parse_args()
    tuned = replace(RECIPES["small"], epochs=options.epochs)
    protocols = Protocols(
        probes=(ALL,), frozen=tuple(FROZEN), fine_tune=tuned, retrieval_images=RETRIEVAL_IMAGES
    )
    runs = []
    for folder in options.runs:
        rows = {
            step: evaluate_checkpoint(
                find_checkpoint(folder, step), options.train, options.heldout, protocols
            )
            for step in ("first", "last")
        }
        recipe = json.loads((folder / "recipe.json").read_text())
        runs.append({"seed": recipe["seed"], "steps": recipe["steps"], "recipe": recipe["name"], **rows})
        write(runs)  # as far as it is known: the rest takes minutes


def write(runs: list[dict[str, Any]]) -> None:
    """The table on the console, and both files."""
    found = summary(runs)
    told = table(found, len(runs))
    print(told, flush=True)
    keep(
        "transfer",
        claim(found, [run["seed"] for run in runs]),
        best_device(),
        summary=found,
        runs=[{k: without_trials(v) if isinstance(v, dict) else v for k, v in run.items()} for run in runs],
    )
    write_atomic(RESULTS / "transfer.md", told.encode())


def without_trials(rows: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the record compares: not every head that was tried, nor the 80 prompts."""
    left_out = ("tried", "prompts", "iou")
    return {name: {k: v for k, v in row.items() if k not in left_out} for name, row in rows.items()}


if __name__ == "__main__":
    main()
