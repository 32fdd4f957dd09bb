"""Where does M3I lose against plain classification on the small scenes? One change at a time.

    OMP_NUM_THREADS=1 python benchmarks/m3i_why.py --data DIR/train --set DIR --out DIR [--seeds 0 1] [--jobs 2]

The budget of the comparison in benchmarks/comparison.md, through `pretrain.compare`: half of the image alone (no
second image, no other target), two images alone (no other target), M3I without mixing, and M3I with more weight on
the labels, a deeper decoder, a slower teacher, spread targets, pooling by the mean, or more steps, which
classification gets too. Copies the table to
benchmarks/results/m3i_why.{json,md,svg}.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import RESULTS
from pretrain.compare.__main__ import run
from pretrain.compare.comparisons import Comparison, Variant
from pretrain.compare.plan import Settings
from pretrain.config import Run
from pretrain.objective import Objective
from pretrain.objectives import CATEGORY, MASKED, MIXED, OBJECTIVES

OBJECTIVES["category_of_half"] = Objective(MASKED, {"category": CATEGORY})
OBJECTIVES["category_of_mixed"] = Objective(MIXED, {"category": CATEGORY})


def heavier_labels(run: Run) -> Run:
    return replace(run, objective=replace(run.objective, gamma=5 * run.objective.gamma))


def deeper_decoder(run: Run) -> Run:
    return replace(run, decoder=replace(run.decoder, layers=4))


def slower_teacher(run: Run) -> Run:
    return replace(run, teacher=replace(run.teacher, momentum=0.99, final_momentum=0.999))


def spread_targets(run: Run) -> Run:
    targets = {
        name: replace(target, uniformity=0.02) if target.kind == "dense" else target
        for name, target in run.objective.targets.items()
    }
    return replace(run, objective=replace(run.objective, targets=targets))


def mean_pool(run: Run) -> Run:
    return replace(run, pool=replace(run.pool, kind="mean"))


def longer(times: int) -> Callable[[Run], Run]:
    def change(run: Run) -> Run:
        optim = replace(run.optim, warmup=times * run.optim.warmup)
        return replace(run, steps=times * run.steps, save_every=times * run.steps, optim=optim)

    return change


COMPARISON = Comparison(
    source="",
    about="M3I against classification, one change at a time",
    variants=(
        Variant("classification", "classification"),
        Variant("category_of_half", "category_of_half"),
        Variant("category_of_mixed", "category_of_mixed"),
        Variant("m3i_without_mixing", "m3i_without_mixing"),
        Variant("m3i", "m3i"),
        Variant("m3i_labels_weigh_5_times", "m3i", change=heavier_labels),
        Variant("m3i_decoder_of_4_layers", "m3i", change=deeper_decoder),
        Variant("m3i_slower_teacher", "m3i", change=slower_teacher),
        Variant("m3i_spread_targets", "m3i", change=spread_targets),
        Variant("m3i_mean_pool", "m3i", change=mean_pool),
        Variant("m3i_2_times_the_steps", "m3i", change=longer(2)),
        Variant("m3i_4_times_the_steps", "m3i", change=longer(4)),
        Variant("classification_2_times_the_steps", "classification", change=longer(2)),
        Variant("classification_4_times_the_steps", "classification", change=longer(4)),
    ),
    epochs=1,
    gpu_hours="none",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    settings = Settings(
        data={"scenes": options.data.resolve()},
        sets={"scenes": options.set.resolve()},
        guides={},
        out=options.out.resolve(),
        seeds=tuple(options.seeds),
        steps=options.steps,
    )
    code = run("m3i_why", COMPARISON, settings, options.jobs)
    for suffix in ("json", "md", "svg"):
        shutil.copyfile(settings.out / f"comparison.{suffix}", RESULTS / f"m3i_why.{suffix}")
    return code


if __name__ == "__main__":
    sys.exit(main())
