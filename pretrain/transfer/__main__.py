"""What is a run's backbone worth for segmentation and detection?

python -m pretrain.transfer segment RUN --data DIR     UperNet: mean IoU
python -m pretrain.transfer detect RUN --data DIR      Mask R-CNN or RT-DETR: box and mask AP

Several ranks share each batch and the test: torchrun --nproc-per-node 8 -m pretrain.transfer segment RUN --data DIR
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from pretrain.collectives import on_every_rank
from pretrain.command import require_place
from pretrain.data.remote import Place
from pretrain.evaluate.checkpoints import bring, local_of
from pretrain.evaluate.protocols import best_device
from pretrain.evaluate.subjects import find_subjects
from pretrain.ranks import exit_code_of_ranks
from pretrain.transfer.examples import MAX_BAD, AnnotatedSet
from pretrain.transfer.order import share_of
from pretrain.transfer.places import FORMATS, Named, open_sets
from pretrain.transfer.recipes import RECIPES, recipe
from pretrain.transfer.training import Machine
from pretrain.transfer.work import RESULT, Work, table, transfer

RUN = "the --out folder of a pre-training run, one of its checkpoints, or an export to safetensors"
TIMEOUT = timedelta(minutes=30)  # of a rank that the others wait for


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pretrain.transfer", description=__doc__.split("\n")[0])
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by DeepSpeed's launcher
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, recipes in RECIPES.items():
        of = tasks.add_parser(task, help=FORMATS[task])
        of.add_argument("run", type=Path, metavar="RUN", help=RUN)
        of.add_argument("--data", type=Path, help=f"folder of both sets: {FORMATS[task]}")
        of.add_argument("--train", type=Path, help="the set that teaches, in place of one in DATA")
        of.add_argument("--heldout", type=Path, help="the set that tests, in place of one in DATA")
        of.add_argument("--recipe", default="small", help=f"one of {sorted(recipes)} (%(default)s)")
        of.add_argument("--step", default="last", help="checkpoint: first, last or a number (%(default)s)")
        of.add_argument("--frozen", action="store_true", help="train the head alone")
        of.add_argument("--seed", type=int, default=0, help="of head, order and crops (%(default)s)")
        of.add_argument("--train-steps", type=int, help="steps of the training, in place of the recipe's")
        of.add_argument("--lr", type=float, help="peak rate of the head, in place of the recipe's")
        of.add_argument(
            "--clip", type=float, help="norm to which gradients are clipped; 0: not (the recipe's)"
        )
        of.add_argument("--out", type=Path, help="folder of result and state (RUN/transfer/TASK-RECIPE-STEP)")
        of.add_argument("--workers", type=int, default=0, help="processes that read images (0: this one)")
        of.add_argument(
            "--max-bad", type=float, default=MAX_BAD, help="share that may be unusable (%(default)s)"
        )
        if task == "detect":
            of.add_argument("--images", type=Path, help="folder of the images that a .json file names")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Trains and tests, writes the JSON result and prints the table; returns the result, on several ranks the first.

    Raises FileNotFoundError and ValueError for what the user can mend, before the first step.
    """
    options = parse(arguments)
    work, place, (train_set, heldout) = on_every_rank(lambda: prepared(options))
    bring(options.run, [place])
    machine = Machine(best_device(), options.workers, options.max_bad)
    if machine.device.type == "cuda":
        torch.cuda.set_device(machine.device)
    result = transfer(work, train_set, heldout, machine)
    if result is not None:
        print(table(result))
        print(f"written to {work.out / RESULT}")
    return result


def prepared(options: argparse.Namespace) -> tuple[Work, Place, tuple[AnnotatedSet, AnnotatedSet]]:
    """What the command line asks for, where its checkpoint lies, and its data."""
    numbers = recipe(options.task, options.recipe)
    changed = {name: getattr(options, name) for name in ("lr", "clip") if getattr(options, name) is not None}
    if options.train_steps is not None:
        changed["steps"] = options.train_steps
        changed["warmup"] = min(numbers.optimisation.warmup, options.train_steps // 2)
    numbers = replace(numbers, optimisation=replace(numbers.optimisation, **changed))
    if not 0 <= options.max_bad < 1:
        raise ValueError(f"--max-bad {options.max_bad} must lie in [0, 1): it is a share")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed {options.seed} must lie in [0, {2**32 - 1}]: give another number")
    if options.workers < 0:
        raise ValueError(f"--workers {options.workers} must not be negative: 0 reads images in this process")
    share_of(numbers.optimisation)
    (named,) = find_subjects(options.run, [options.step])
    place, step = named.place, local_of(options.run, named.place)
    out = options.out or options.run / "transfer" / f"{options.task}-{options.recipe}-{step.name}"
    require_place("--out", out / RESULT)
    named = Named(options.data, options.train, options.heldout, getattr(options, "images", None))
    work = Work(step, numbers, options.recipe, out, options.frozen, options.seed)
    return work, place, open_sets(options.task, named, options.max_bad)


def main(arguments: list[str] | None = None) -> int:
    """Exit code. A mistake of the user's is told in one message, of several ranks by the first."""
    left = "the same command goes on from the last state that was kept, if any"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    return exit_code_of_ranks(run, arguments, left, TIMEOUT, backend)


if __name__ == "__main__":
    sys.exit(main())
