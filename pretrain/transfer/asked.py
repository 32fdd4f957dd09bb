"""What does a command line of transfer ask for, and on which data?"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.names import run_around
from pretrain.collectives import on_every_rank, rank
from pretrain.command import require_place
from pretrain.evaluate.checkpoints import bring, local_of
from pretrain.evaluate.protocols import best_device
from pretrain.evaluate.subjects import find_subjects
from pretrain.place import Place
from pretrain.transfer.arguments import STEP, recipe_of
from pretrain.transfer.examples import AnnotatedSet
from pretrain.transfer.lvis import require_federation
from pretrain.transfer.memory import within_memory
from pretrain.transfer.order import share_of
from pretrain.transfer.places import Named, open_sets
from pretrain.transfer.training import Machine
from pretrain.transfer.work import RESULT, Work, left_out, require_own, table, transfer


def transferred(options: argparse.Namespace) -> dict[str, Any] | None:
    """Trains and tests, writes the JSON result and prints the table; returns the result, on several ranks the first.

    Raises FileNotFoundError and ValueError for what the user can mend, before the first step.
    """
    work, place, (train_set, heldout) = on_every_rank(lambda: prepared(options))
    if rank() == 0:
        for line in left_out({"train": train_set.dropped, "heldout": heldout.dropped}):
            print(line, flush=True)
    bring(options.run, [place])
    machine = Machine(best_device(), options.workers, options.max_bad)
    if machine.device.type == "cuda":
        torch.cuda.set_device(machine.device)
    with within_memory(work.recipe, work.name, machine.device):
        result = transfer(work, train_set, heldout, machine)
    if result is not None:
        print("\n".join([table(result), *left_out(result["dropped"])]))
        print(f"written to {work.out / RESULT}")
    return result


def prepared(options: argparse.Namespace) -> tuple[Work, Place, tuple[AnnotatedSet, AnnotatedSet]]:
    """The work, where its checkpoint lies, and its data."""
    recipe = recipe_of(options)
    share_of(recipe.optimisation)
    asked = options.step and f"--step {options.step}"
    (named,) = find_subjects(options.run, [options.step or STEP], asked=asked)
    place, step = named.place, local_of(options.run, named.place)
    out = options.out or result_of(options.run, place, f"{options.task}-{options.recipe}-{named.name}")
    require_own(out)
    require_place("--out", out / RESULT)
    named = Named(options.data, options.train, options.heldout, getattr(options, "images", None))
    work = Work(step, recipe, options.recipe, out, options.frozen, options.seed)
    sets = open_sets(options.task, named, options.max_bad)
    require_federation(options.recipe, recipe, sets)
    return work, place, sets


def result_of(asked: Path, place: Place, name: str) -> Path:
    """Where the result lies if no other place is named: in a run, also of one of its checkpoints; beside another
    checkpoint or an export.

    An export that is made again takes the place of its whole folder.
    """
    if place != asked:
        return asked / "transfer" / name
    folder = Path(os.path.abspath(asked if asked.is_dir() else asked.parent))
    run = run_around(folder)
    return Path(f"{folder}.transfer", name) if run is None else run / "transfer" / name
