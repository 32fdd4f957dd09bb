"""How good are the teacher's features on held-out images, before and after pre-training?

python -m pretrain.evaluate RUN --data DIR        DIR/train gives the probes their examples, DIR/heldout tests them
    --fine-tune [EPOCHS]                          the whole encoder too, trained on the categories: costs a training
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain import provenance
from pretrain.command import exit_code, require_place
from pretrain.evaluate import result
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.evaluate.few_shot import SHARES
from pretrain.evaluate.fine_tune import RECIPES
from pretrain.evaluate.probes import ALL, DEFAULT, PROBES, SLOW
from pretrain.evaluate.protocols import SPLITS, Protocols, best_device, measure_checkpoint, read_manifests
from pretrain.evaluate.templates import AUTO, TEMPLATES


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pretrain.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the --out folder of a pre-training run")
    parser.add_argument("--data", type=Path, help="folder of the data sets train/ and heldout/")
    parser.add_argument("--train", type=Path, help="data set of the examples, in place of DATA/train")
    parser.add_argument("--heldout", type=Path, help="data set of the tests, in place of DATA/heldout")
    parser.add_argument(
        "--steps", default="first,last", help="checkpoints: first, last, numbers (first,last)"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the result (RUN/evaluation.json)")
    parser.add_argument(
        "--probes",
        default=",".join(DEFAULT),
        help=f"what is measured, with commas (%(default)s); also {', '.join(SLOW)}; or {ALL}",
    )
    parser.add_argument(
        "--fine-tune",
        nargs="?",
        type=int,
        const=0,
        metavar="EPOCHS",
        help="train the whole encoder on the categories too (off; the recipe's epochs)",
    )
    parser.add_argument(
        "--fine-tune-recipe",
        choices=list(RECIPES),
        default="small",
        help="how: for small sets, or the paper's on ImageNet-1k (%(default)s)",
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
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (0: this one)")
    return parser.parse_args(arguments)


def evaluate(arguments: list[str] | None = None) -> dict[str, Any]:
    """Evaluates, writes the JSON result and prints the table; returns the result.

    Raises FileNotFoundError and ValueError for what the user can mend, before any image is read.
    """
    options = parse(arguments)
    protocols = protocols_of(options)
    out = options.out or options.run / "evaluation.json"
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file, such as {out / 'evaluation.json'}")
    if options.run.is_dir():
        require_place("--out", out)
    folders = split_folders(options.data, options.train, options.heldout)
    manifests = read_manifests(folders)
    steps = [find_checkpoint(options.run, name.strip()) for name in options.steps.split(",")]
    device = best_device()
    evaluated: dict[str, Any] = {"checkpoints": {}}
    for step in dict.fromkeys(steps):  # each once: of a run's beginning the first is the last
        measured = measure_checkpoint(step, folders, manifests, protocols, device)
        evidence, outcomes = measured.evidence, measured.outcomes
        evaluated |= result.header(measured.run, folders, manifests, provenance.hardware(device))
        evaluated["checkpoints"][step.name] = result.of_checkpoint(evidence, outcomes)
        evaluated["confusion"] = result.confusion(step.name, evidence, outcomes)
        evaluated["neighbours"] = result.neighbours(step.name, evidence)
    result.write(out, evaluated)
    print(result.table(evaluated))
    print(f"written to {out}")
    return evaluated


def protocols_of(options: argparse.Namespace) -> Protocols:
    """What the command line asks for."""
    probes = tuple(name.strip() for name in options.probes.split(","))
    if options.few_shot and probes != (ALL,):
        probes = tuple(dict.fromkeys([*probes, *(n for n in PROBES if n.startswith("few_shot_"))]))
    tuned = None
    if options.fine_tune is not None:
        tuned = RECIPES[options.fine_tune_recipe]
        tuned = replace(tuned, epochs=options.fine_tune) if options.fine_tune else tuned
    return Protocols(
        probes=probes,
        ks=numbers_of(options.k),
        templates=options.templates,
        fine_tune=tuned,
        fine_tune_shares=SHARES if tuned is not None and options.few_shot else (),
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
        named[split] = named[split] or data / split
        if not named[split].is_dir():
            raise FileNotFoundError(
                f"{named[split]} is no folder: `python -m data_prep build` writes train/ and heldout/, "
                f"or name a data set by --{split}"
            )
    if named["train"].resolve() == named["heldout"].resolve():
        raise ValueError(
            f"--train and --heldout are both {named['train']}: accuracy on images that the probes have seen says "
            "nothing; name two data sets"
        )
    return named


def main(arguments: list[str] | None = None) -> int:
    """Exit code. A mistake of the user's is told in one message."""
    return exit_code(evaluate, arguments)


if __name__ == "__main__":
    sys.exit(main())
