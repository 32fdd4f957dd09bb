"""How good are the teacher's features on held-out images, before and after pre-training?

python -m pretrain.evaluate RUN --data DIR        DIR/train gives the probes their examples, DIR/heldout tests them
    --probes all --few-shot                       everything that reads features once
    --probes linear_paper                         the paper's linear probe, a head trained on fresh crops
    --fine-tune [EPOCHS]                          the whole encoder too, trained on the categories: costs a training

RUN is a run, one of its checkpoints, or an exported or published model (timm, internimage, safetensors,
Hugging Face, open_clip). DIR/train and DIR/heldout are data sets of `data_prep`, or folders with one folder of images
a class. Several ranks share images and probes: torchrun --nproc-per-node 8 -m pretrain.evaluate RUN --data DIR
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_prep.schema import Manifest
from pretrain import provenance
from pretrain.collectives import from_first_rank, on_every_rank, rank
from pretrain.command import require_place
from pretrain.evaluate import result
from pretrain.evaluate.checkpoints import bring
from pretrain.evaluate.few_shot import SHARES
from pretrain.evaluate.fine_tune_recipes import FEW, FROZEN, RECIPES
from pretrain.evaluate.fine_tune_state import remove_states, require_recipes
from pretrain.evaluate.probes import ALL, DEFAULT, PROBES, SLOW
from pretrain.evaluate.protocols import Protocols, best_device, measure_subject
from pretrain.evaluate.published import is_published
from pretrain.evaluate.retrieval import MOST_GALLERIES, MOST_IMAGES
from pretrain.evaluate.sets import Listing, read_manifests
from pretrain.evaluate.shares import TIMEOUT
from pretrain.evaluate.splits import FOLDERS, SPLITS, found_in
from pretrain.evaluate.subjects import Named, find_subjects
from pretrain.evaluate.templates import AUTO, TEMPLATES
from pretrain.ranks import exit_code_of_ranks

RESULT = "evaluation.json"
INTERRUPTED = "measured checkpoints are in the result, if any; the same command goes on with a training"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pretrain.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run, checkpoint, or exported model")
    parser.add_argument(
        "--data", type=Path, help="folder of the data sets train/ and heldout/ (or val/, test/)"
    )
    parser.add_argument("--train", type=Path, help="data set of the examples, in place of DATA/train")
    parser.add_argument("--heldout", type=Path, help="data set of the tests, in place of DATA/heldout")
    parser.add_argument(
        "--steps", default="first,last", help="checkpoints: first, last, numbers (first,last)"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file of the result (RUN/evaluation.json; beside what is no run)"
    )
    parser.add_argument("--image-size", type=int, help="pixels a side, of an exported model (what it tells)")
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
    parser.add_argument(
        "--retrieval-images",
        type=int,
        default=MOST_IMAGES,
        metavar="N",
        help="held-out images that compete in retrieval, with all of their captions (%(default)s); of more images "
        f"recall is the mean over up to {MOST_GALLERIES} such galleries",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (0: this one)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by DeepSpeed's launcher
    return parser.parse_args(arguments)


def evaluate(arguments: list[str] | None = None) -> dict[str, Any]:
    """Evaluates, writes the JSON result and prints the table; returns the result.

    Raises FileNotFoundError and ValueError for what the user can mend, before any image is read.
    """
    options = parse(arguments)
    protocols, subjects, out, folders, manifests = on_every_rank(lambda: prepared(options))
    bring(options.run, [subject.place for subject in subjects])
    device = best_device()
    if device.type == "cuda":  # collective calls and random states mean this one
        torch.cuda.set_device(device)
    recipes = {training.row: training.recipe for training in protocols.trainings}
    if recipes:
        protocols = replace(protocols, states=out.with_name(f"{out.stem}.fine_tuning"))
        from_first_rank(lambda: require_recipes(protocols.states, recipes))
    evaluated: dict[str, Any] = {"checkpoints": {}}
    data = result.data_of(folders, manifests)
    for subject in subjects:
        measured = measure_subject(on_every_rank(subject.open), folders, manifests, protocols, device)
        evidence, outcomes = measured.evidence, measured.outcomes
        is_first = not evaluated["checkpoints"]
        evaluated |= result.header(measured.run, folders, manifests, provenance.hardware(device))
        evaluated["checkpoints"][subject.name] = result.of_checkpoint(evidence, outcomes)
        evaluated["confusion"] = result.confusion(subject.name, evidence, outcomes)
        evaluated["neighbours"] = result.neighbours(subject.name, evidence)
        names = [s.name for s in subjects] if is_first else None
        kept = from_first_rank(lambda: _written(out, evaluated, names, protocols, data))  # noqa: B023  called at once
        if kept and rank() == 0:
            print(f"what {out} held of other checkpoints, probes or data is kept as {kept}")
    if rank() == 0:
        print(result.table(evaluated))
        print(f"written to {out}")
        if protocols.states is not None:  # the next one begins anew
            remove_states(protocols.states, recipes)
    return evaluated


def _written(
    out: Path, evaluated: dict[str, Any], names: list[str] | None, protocols: Protocols, data: dict[str, Any]
) -> Path | None:
    """Writes what is measured, whatever becomes of the next subject; `names`, of all subjects, come with the first,
    when a result of other rows or data is set aside. Returns where that lies now.
    """
    kept = None if names is None else result.set_aside(out, names, protocols.rows, data)
    result.write(out, evaluated)
    return kept


def prepared(
    options: argparse.Namespace,
) -> tuple[Protocols, list[Named], Path, dict[str, Path], dict[str, Manifest | Listing]]:
    """What the command line asks for, where it lies, the file of the result, and the data."""
    protocols = protocols_of(options)
    subjects = find_subjects(options.run, [n.strip() for n in options.steps.split(",")], options.image_size)
    out = options.out or result_of(options.run)
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file, such as {out / RESULT}")
    require_place("--out", out)
    result.rows_there(out)
    folders = split_folders(options.data, options.train, options.heldout)
    return protocols, subjects, out, folders, read_manifests(folders)


def result_of(place: Path) -> Path:
    """Where the result lies if no other place is named: in a run, beside a checkpoint or an exported model."""
    is_run = place.is_dir() and not is_published(place) and not (place / "run.json").is_file()
    return place / RESULT if is_run else place.with_name(f"{place.name}.{RESULT}")


def protocols_of(options: argparse.Namespace) -> Protocols:
    """What the command line asks for."""
    named = [name.strip() for name in options.probes.split(",")]
    probes = tuple(name for name in named if name not in FROZEN)
    if options.few_shot and ALL not in probes:
        probes = tuple(dict.fromkeys([*probes, *(n for n in PROBES if n.startswith("few_shot_"))]))
    if ALL in probes:
        probes = (ALL,)
    tuned = None
    if options.fine_tune is not None:
        tuned = RECIPES[options.fine_tune_recipe]
        tuned = replace(tuned, epochs=options.fine_tune) if options.fine_tune else tuned
    return Protocols(
        probes=probes,
        ks=numbers_of(options.k),
        templates=options.templates,
        retrieval_images=options.retrieval_images,
        frozen=tuple(name for name in FROZEN if name in named),
        fine_tune=tuned,
        fine_tune_few=FEW[options.fine_tune_recipe] if tuned is not None and options.few_shot else {},
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
                f"{named[split]} is no folder{also}: `python -m data_prep build` writes train/ and heldout/, "
                f"or name a data set by --{split}"
            )
    if named["train"].resolve() == named["heldout"].resolve():
        raise ValueError(
            f"--train and --heldout are both {named['train']}: accuracy on images that the probes have seen says "
            "nothing; name two data sets"
        )
    return named


def main(arguments: list[str] | None = None) -> int:
    """Exit code. A mistake of the user's is told in one message, of several ranks by the first."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    return exit_code_of_ranks(evaluate, arguments, INTERRUPTED, TIMEOUT, backend)


if __name__ == "__main__":
    sys.exit(main())
