"""What do the chosen protocols say of one checkpoint?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.schema import Manifest
from pretrain.collectives import all_rows, from_first_rank
from pretrain.config import Run
from pretrain.evaluate import dense, few_shot, result
from pretrain.evaluate.accuracy import score
from pretrain.evaluate.asked import Protocols, Training
from pretrain.evaluate.evidence import (
    Evidence,
    NotMeasured,
    Outcome,
    heldout_labels,
    is_labelled,
    not_finite,
    outcome_of,
)
from pretrain.evaluate.features import Features, extract
from pretrain.evaluate.fine_tune import fine_tune, predict, require_blocks
from pretrain.evaluate.fine_tune_order import Examples
from pretrain.evaluate.fine_tune_precision import name_of
from pretrain.evaluate.probes import PROBES, measure
from pretrain.evaluate.rows import TITLES
from pretrain.evaluate.sets import Listing, read_manifests, sha256_of
from pretrain.evaluate.shares import divided
from pretrain.evaluate.splits import SPLITS
from pretrain.evaluate.subjects import Subject, embed_with, open_checkpoint


@dataclass(frozen=True)
class Measured:
    """What came out of one checkpoint."""

    run: Run
    evidence: Evidence
    outcomes: dict[str, Outcome]  # by row of the result


def evaluate_checkpoint(
    step: Path, train: Path, heldout: Path, protocols: Protocols, device: torch.device | None = None
) -> dict[str, Any]:
    """Rows of the result by name, fit for JSON, of the checkpoint folder `step`; nothing is printed or written.

    A row holds `accuracy` (of "dense" the mean IoU), its 95 % `interval` (None of a single image), `chance` and
    `n`, or the accuracy None and a `reason`; "fine_tune" is there when the protocols ask for it, "dropped" counts
    the samples left out.
    `device` is the first GPU, or the CPU without one, if left out. Raises what `read_manifests` and `load_towers` do.
    """
    folders = {"train": train, "heldout": heldout}
    manifests = read_manifests(folders)
    measured = measure_subject(open_checkpoint(step), folders, manifests, protocols, device or best_device())
    return result.of_checkpoint(measured.evidence, measured.outcomes)


def best_device() -> torch.device:
    """The GPU that the launcher gave this rank, the first one without launcher, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def measure_subject(
    subject: Subject,
    folders: Mapping[str, Path],
    manifests: Mapping[str, Manifest | Listing],
    protocols: Protocols,
    device: torch.device,
) -> Measured:
    """Runs the encoder once over both data sets, then the probes, then what is trained on images.

    A collective call: on several ranks each keeps the features of a share of the images, and has a share of every
    protocol; all are given what came out. ValueError, before an image is read, for an encoder that the recipe of
    fine-tuning does not fit.
    """
    run, towers = subject.run, subject.towers.to(device)
    for training in protocols.trainings:
        require_blocks(towers, training.recipe.drop_path)
    samplings = {"train": dense.TRAIN, "heldout": dense.HELDOUT}
    kept = frozenset().union(*(PROBES[name].reads for name in protocols.probes))
    features = {}
    for split in SPLITS:
        work = partial(
            extract,
            towers,
            run,
            folders[split],
            device=device,
            workers=protocols.workers,
            title=f"{subject.name} {split}",
            dense=samplings[split],
            kept=kept,
        )
        features[split] = divided(work, run.max_bad, folders[split])
    measured = _probed(subject, towers, features, manifests, protocols, device)
    if protocols.trainings:
        labelled = _labelled(measured.evidence, folders, has_states=protocols.states is not None)
        for training in protocols.trainings:
            work = partial(_trained, training, subject, towers, labelled, protocols, device)
            measured.outcomes[training.row] = outcome_of(work)
    return measured


def _probed(
    subject: Subject,
    towers: nn.Module,
    features: Mapping[str, Features],
    manifests: Mapping[str, Manifest | Listing],
    protocols: Protocols,
    device: torch.device,
) -> Measured:
    """What the probes say."""
    evidence = Evidence(
        train=features["train"],
        heldout=features["heldout"],
        categories=manifests["heldout"].categories,
        facts=subject.facts,
        ks=protocols.ks,
        templates=protocols.templates,
        encode=subject.encode,
        without_text=subject.without_text,
        without_heads=subject.without_heads,
        embed=embed_with(towers, device),
        device=device,
        retrieval_images=protocols.retrieval_images,
    )
    return Measured(subject.run, evidence, measure(evidence, protocols.probes))


@dataclass(frozen=True)
class _Labelled:
    """What a training on images sees and is tested on."""

    train: Examples
    heldout: Examples
    num_categories: int
    problem: str = ""  # why there is nothing of it


def _labelled(evidence: Evidence, folders: Mapping[str, Path], *, has_states: bool) -> _Labelled:
    """That of all ranks; with what a state tells of the data, if any `has_states`. A collective call."""
    problem = not_finite(evidence)
    try:
        heldout_labels(evidence)
    except NotMeasured as reason:
        problem = str(reason)
    found = []
    for name in SPLITS:
        features = getattr(evidence, name)
        rows = is_labelled(features)
        sha256 = from_first_rank(partial(sha256_of, folders[name])) if has_states else ""
        index, labels = (all_rows(values[rows]) for values in (features.index, features.labels))
        found.append(Examples(folders[name], index, labels, sha256))
    return _Labelled(*found, len(evidence.categories), problem)


def _trained(
    training: Training,
    subject: Subject,
    towers: nn.Module,
    labelled: _Labelled,
    protocols: Protocols,
    device: torch.device,
) -> Outcome:
    """What comes of a training. A collective call."""
    if labelled.problem:
        raise NotMeasured(labelled.problem)
    recipe, share, title = training.recipe, training.share, f"{subject.name} {TITLES[training.row]}"
    train, truth = labelled.train, labelled.heldout.labels
    precisions: list[str] = []  # of every training

    def predicted_after(rows: Tensor, seed: int) -> Tensor:
        model = fine_tune(
            towers,
            subject.run,
            replace(train, index=train.index[rows], labels=train.labels[rows]),
            labelled.num_categories,
            replace(recipe, seed=recipe.seed + seed),
            device=device,
            workers=protocols.workers,
            title=title if share is None else f"{title}, draw {seed}",
            state=None
            if protocols.states is None
            else protocols.states / subject.name / f"{training.row}_{seed}.pt",
        )
        precisions.append(name_of(model.precision))
        return predict(model, subject.run, labelled.heldout, device=device, workers=protocols.workers)

    if share is None:
        num_images = len(train.index)
        predicted = predicted_after(torch.arange(num_images), 0)
        settings = {"train_images": num_images, "recipe": asdict(recipe), "precision": precisions[0]}
        return Outcome(score(predicted, truth, labelled.num_categories) | settings, predicted)
    seeds = few_shot.SEEDS[: protocols.fine_tune_draws]
    if len(few_shot.draw(train.labels, share, seeds[0])) < 2:
        raise NotMeasured(f"{share} % of the labels is one image, fine-tuning needs two or more")
    found = few_shot.over_draws(train.labels, share, truth, predicted_after, labelled.num_categories, seeds)
    return Outcome(found | {"recipe": asdict(recipe), "precision": precisions[0]})
