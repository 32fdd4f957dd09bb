"""Does every row of the table of objectives begin to learn on the scenes, and does its teacher keep a spread?

    OMP_NUM_THREADS=1 python benchmarks/rows_learn.py --labelled data/demo/labelled/train \
        --captioned data/demo/captioned/train

One process without DeepSpeed, float32, the small recipes `rows.NAME_demo`, the same images, steps and seed for all.
Tells each loss at the first and the last logged step, and what pretrain.collapse measures of every target (its `std`
is 1 / sqrt(width) when spread, collapsed below half of it). Far too short to rank methods. Writes
benchmarks/results/rows_learn.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.feature_norm import follow
from benchmarks.record import keep
from pretrain.recipes import load
from pretrain.recipes.rows import ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labelled", type=Path, required=True)
    parser.add_argument("--captioned", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    folders = {"labelled": options.labelled, "captioned": options.captioned}
    found = {}
    for row in ROWS:
        begun = time.perf_counter()
        curve = follow(row, load(f"rows.{row}_demo"), folders, options.steps)
        found[row] = {"first": curve[0], "last": curve[-1], "seconds": round(time.perf_counter() - begun)}
    keep(
        "rows_learn",
        f"the loss of every row falls in {options.steps} steps",
        torch.device("cpu"),
        steps=options.steps,
        rows=found,
    )


if __name__ == "__main__":
    main()
