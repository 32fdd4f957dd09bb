"""Which words does the command line take? Without torch, so that a mistake is told at once."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from pretrain.transfer.formats import FEW, FORMATS, MAX_BAD
from pretrain.transfer.recipes import RECIPES, Detect, Segment, recipe

DESCRIPTION = "What is a run's backbone worth for segmentation and detection?"
STEP = "last"  # checkpoint of a run, where none is asked for
RUN = (
    "the --out folder of a pre-training run, one of its checkpoints, or an export to any format but onnx: its folder "
    "or a file of weights in it"
)
BAD = (
    f"share of images or annotations that may be unusable, of fewer than {FEW} as of {FEW} (%(default)s: one is let "
    "through in any case)"
)
OUT = (
    "folder of result and state (RUN/transfer/TASK-RECIPE-STEP, also of RUN/checkpoints/STEP; beside a checkpoint "
    "elsewhere or an export RUN.transfer/TASK-RECIPE-NAME)"
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pretrain.transfer", description=DESCRIPTION)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by DeepSpeed's launcher
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, recipes in RECIPES.items():
        of = tasks.add_parser(task, help=FORMATS[task])
        of.add_argument("run", type=Path, metavar="RUN", help=RUN)
        of.add_argument("--data", type=Path, help=f"folder of both sets: {FORMATS[task]}")
        of.add_argument("--train", type=Path, help="the set that teaches, in place of one in DATA")
        of.add_argument("--heldout", type=Path, help="the set that tests, in place of one in DATA")
        of.add_argument("--recipe", default="small", help=f"one of {sorted(recipes)} (%(default)s)")
        of.add_argument("--step", help=f"checkpoint of a run: first, last or a number ({STEP})")
        of.add_argument("--frozen", action="store_true", help="train the head alone")
        of.add_argument("--seed", type=int, default=0, help="of head, order and crops (%(default)s)")
        of.add_argument("--train-steps", type=int, help="steps of the training, in place of the recipe's")
        of.add_argument("--lr", type=float, help="peak rate of the head, in place of the recipe's")
        of.add_argument(
            "--clip", type=float, help="norm to which gradients are clipped; 0: not (the recipe's)"
        )
        of.add_argument("--out", type=Path, help=OUT)
        of.add_argument("--workers", type=int, default=0, help="processes that read images (0: this one)")
        of.add_argument("--max-bad", type=float, default=MAX_BAD, help=BAD)
        if task == "detect":
            of.add_argument("--images", type=Path, help="folder of the images that a .json file names")
    return parser.parse_args(arguments)


def recipe_of(options: argparse.Namespace) -> Segment | Detect:
    """The recipe with what is changed of it; ValueError for a number that no option takes."""
    if not 0 <= options.max_bad < 1:
        raise ValueError(f"--max-bad {options.max_bad} must lie in [0, 1): it is a share")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed {options.seed} must lie in [0, {2**32 - 1}]: give another number")
    if options.workers < 0:
        raise ValueError(f"--workers {options.workers} must not be negative: 0 reads images in this process")
    if options.lr is not None and not 0 < options.lr < math.inf:
        raise ValueError(f"--lr {options.lr} must be above 0 and finite: it is the peak rate of the head")
    if options.clip is not None and not 0 <= options.clip < math.inf:
        raise ValueError(f"--clip {options.clip} must not be negative, and finite: 0 clips nothing")
    if options.train_steps is not None and options.train_steps < 1:
        raise ValueError(f"--train-steps {options.train_steps} must be 1 or more: give another number")
    numbers = recipe(options.task, options.recipe)
    changed = {name: getattr(options, name) for name in ("lr", "clip") if getattr(options, name) is not None}
    if options.train_steps is not None:
        changed["steps"] = options.train_steps
        changed["warmup"] = min(numbers.optimisation.warmup, options.train_steps // 2)
    return replace(numbers, optimisation=replace(numbers.optimisation, **changed))
