"""What does a command line find, subject by subject, and where is it written?"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_prep.schema import Manifest
from pretrain import provenance
from pretrain.checkpoint.names import run_around
from pretrain.collectives import from_first_rank, on_every_rank, rank
from pretrain.command import require_place
from pretrain.evaluate import result
from pretrain.evaluate.arguments import STEPS, parse, protocols_of, split_folders
from pretrain.evaluate.asked import Protocols
from pretrain.evaluate.checkpoints import bring
from pretrain.evaluate.fine_tune_state import data_settings, remove_states, require_same_trainings
from pretrain.evaluate.protocols import best_device, measure_subject
from pretrain.evaluate.published import is_published
from pretrain.evaluate.sets import Listing, read_manifests
from pretrain.evaluate.subjects import Named, find_subjects

RESULT = "evaluation.json"


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
    data = from_first_rank(lambda: result.data_of(folders, manifests))
    recipes = {training.row: training.recipe for training in protocols.trainings}
    if recipes:
        protocols = replace(protocols, states=out.with_name(f"{out.stem}.fine_tuning"))
        train = data_settings(folders["train"], data["train"]["sha256"])
        from_first_rank(lambda: require_same_trainings(protocols.states, recipes, train))
    evaluated: dict[str, Any] = {"checkpoints": {}, "weights": {}}
    for subject in subjects:
        opened = on_every_rank(subject.open)
        if opened.note and rank() == 0:
            print(f"{subject.name}: {opened.note}")
        measured = measure_subject(opened, folders, manifests, protocols, device)
        evidence, outcomes = measured.evidence, measured.outcomes
        is_first = not evaluated["checkpoints"]
        evaluated |= result.header(measured.run, data, evidence.categories, provenance.hardware(device))
        evaluated["checkpoints"][subject.name] = result.of_checkpoint(evidence, outcomes)
        evaluated["weights"][subject.name] = opened.weights
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
    from_first_rank(lambda: result.require_measured(evaluated, out))
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
    asked = options.steps and f"--steps {options.steps}"
    steps = [name.strip() for name in (options.steps or STEPS).split(",")]
    subjects = find_subjects(options.run, steps, options.image_size, asked=asked)
    out = options.out or result_of(options.run)
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file, such as {out / RESULT}")
    require_place("--out", out)
    result.rows_there(out)
    folders = split_folders(options.data, options.train, options.heldout)
    return protocols, subjects, out, folders, read_manifests(folders)


def result_of(place: Path) -> Path:
    """Where the result lies if no other place is named: in a run, also of one of its checkpoints, by its name; beside
    another checkpoint or an exported model."""
    is_run = place.is_dir() and not is_published(place) and not (place / "run.json").is_file()
    if is_run:
        return place / RESULT
    place = Path(os.path.abspath(place))  # of "." too, which has no name
    return (run_around(place) or place.parent) / f"{place.name}.{RESULT}"
