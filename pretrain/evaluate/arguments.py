"""Which words does the command line take? Without torch, so that a mistake is told at once."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from pretrain.command import no_folder
from pretrain.evaluate.asked import Protocols
from pretrain.evaluate.fine_tune_recipes import FEW, FROZEN, RECIPES
from pretrain.evaluate.rows import ALL, DEFAULT, FEW_LABELS, MOST_GALLERIES, MOST_IMAGES, SHARES, SLOW
from pretrain.evaluate.splits import FOLDERS, SPLITS, found_in
from pretrain.evaluate.templates import AUTO, TEMPLATES

DESCRIPTION = "How good are the teacher's features on held-out images, before and after pre-training?"

STEPS = "first,last"  # that are measured of a run
TUNED_BY = "small"  # the recipe of fine-tuning


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pretrain.evaluate", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="run, checkpoint, or exported model")
    parser.add_argument(
        "--data", type=Path, help="folder of the data sets train/ and heldout/ (or val/, test/)"
    )
    parser.add_argument("--train", type=Path, help="data set of the examples, in place of DATA/train")
    parser.add_argument("--heldout", type=Path, help="data set of the tests, in place of DATA/heldout")
    parser.add_argument("--steps", help=f"checkpoints of a run: first, last, numbers ({STEPS})")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file of the result (RUN/evaluation.json, RUN/STEP.evaluation.json; beside what is of no run)",
    )
    parser.add_argument("--image-size", type=int, help="pixels a side, of an exported model (what it tells)")
    _add_protocols(parser)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (0: this one)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by DeepSpeed's launcher
    return parser.parse_args(arguments)


def _add_protocols(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how."""
    parser.add_argument(
        "--probes",
        default=",".join(DEFAULT),
        help=f"what is measured, with commas (%(default)s); also {', '.join(SLOW)}; {ALL} of these; and, which train "
        f"a head on fresh crops of the images, {', '.join(FROZEN)}",
    )
    parser.add_argument(
        "--fine-tune",
        nargs="?",
        type=int,
        const=0,
        metavar="EPOCHS",
        help="train the whole encoder on the categories too (off; the recipe's epochs, on all labels)",
    )
    parser.add_argument(
        "--fine-tune-recipe",
        choices=list(RECIPES),
        help=f"how: for small sets, or the paper's on ImageNet-1k ({TUNED_BY})",
    )
    parser.add_argument(
        "--few-shot",
        action="store_true",
        help=f"kNN, linear probe and --fine-tune on {' and '.join(map(str, SHARES))} %% of the labels too",
    )
    parser.add_argument(
        "--k",
        default=",".join(map(str, Protocols.ks)),
        help="numbers of neighbours of kNN; the first stands in the table (%(default)s)",
    )
    parser.add_argument(
        "--templates",
        default=AUTO,
        help=f"sentences of zero-shot classification: {', '.join(TEMPLATES)} ({AUTO}: ImageNet's for its classes)",
    )
    parser.add_argument(
        "--retrieval-images",
        type=int,
        default=MOST_IMAGES,
        metavar="N",
        help="held-out images that compete in retrieval, with all of their captions (%(default)s); of more images "
        f"recall is the mean over up to {MOST_GALLERIES} such galleries",
    )


def protocols_of(options: argparse.Namespace) -> Protocols:
    """What the command line asks for."""
    named = [name.strip() for name in options.probes.split(",")]
    probes = tuple(name for name in named if name not in FROZEN)
    if options.few_shot and ALL not in probes:
        probes = tuple(dict.fromkeys([*probes, *FEW_LABELS]))
    if ALL in probes:
        probes = (ALL,)
    tuned, recipe = None, options.fine_tune_recipe or TUNED_BY
    if options.fine_tune_recipe is not None and options.fine_tune is None:
        raise ValueError(
            f"--fine-tune-recipe {recipe} would be ignored, nothing is fine-tuned: add --fine-tune, or leave it out"
        )
    if options.fine_tune is not None:
        tuned = RECIPES[recipe]
        tuned = replace(tuned, epochs=options.fine_tune) if options.fine_tune else tuned
    return Protocols(
        probes=probes,
        ks=numbers_of(options.k),
        templates=options.templates,
        retrieval_images=options.retrieval_images,
        frozen=tuple(name for name in FROZEN if name in named),
        fine_tune=tuned,
        fine_tune_few=FEW[recipe] if tuned is not None and options.few_shot else {},
        workers=options.workers,
    )


def numbers_of(text: str) -> tuple[int, ...]:
    """The numbers of neighbours in "20,10,200"; ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--k {text!r} must be whole numbers with commas between, such as 20,10,200")
    return tuple(dict.fromkeys(int(part) for part in parts))


def split_folders(data: Path | None, train: Path | None, heldout: Path | None) -> dict[str, Path]:
    """The two data sets that the command line names."""
    named = {"train": train, "heldout": heldout}
    for split in SPLITS:
        if named[split] is None and data is None:
            raise ValueError(
                f"no {split} data set is named: give --data DIR with train/ and heldout/, or --{split}"
            )
        named[split] = named[split] or found_in(data, split)
        if not named[split].is_dir():
            also = f" (nor is one of {', '.join(FOLDERS[split][1:])})" if split == "heldout" else ""
            raise FileNotFoundError(
                f"{no_folder(named[split])}{also}: `python -m data_prep build` writes train/ and heldout/, "
                f"or name a data set by --{split}"
            )
    if named["train"].resolve() == named["heldout"].resolve():
        raise ValueError(
            f"--train and --heldout are both {named['train']}: accuracy on images that the probes have seen says "
            "nothing; name two data sets"
        )
    return named
