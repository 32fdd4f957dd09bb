"""What do the chosen protocols say of one checkpoint?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.schema import Manifest
from pretrain.collectives import rank
from pretrain.config import Run
from pretrain.evaluate import dense, few_shot, result
from pretrain.evaluate.accuracy import score
from pretrain.evaluate.evidence import Evidence, Outcome, heldout_labels, is_labelled, outcome_of
from pretrain.evaluate.features import extract
from pretrain.evaluate.fine_tune import Examples, FineTune, fine_tune, predict
from pretrain.evaluate.probes import ALL, DEFAULT, PROBES, measure
from pretrain.evaluate.sets import SPLITS, Listing, read_manifests
from pretrain.evaluate.shares import gathered
from pretrain.evaluate.subjects import Subject, embed_with, open_checkpoint
from pretrain.evaluate.templates import AUTO, check_templates


@dataclass(frozen=True)
class Protocols:
    """What is measured, and how."""

    probes: tuple[str, ...] = DEFAULT  # or (ALL,)
    ks: tuple[int, ...] = (20, 10, 200)  # neighbours of kNN; the first stands in the table
    templates: str = AUTO  # of zero-shot classification
    fine_tune: FineTune | None = None  # None: not fine-tuned, which costs a training
    fine_tune_shares: tuple[int, ...] = ()  # of few_shot.SHARES, per cent of the labels to fine-tune on too
    fine_tune_draws: int = 3  # of the labels, each of which costs a training
    workers: int = 0  # processes that decode images; 0: this one

    def __post_init__(self) -> None:
        if self.probes == (ALL,):
            object.__setattr__(self, "probes", tuple(PROBES))
        if unknown := [name for name in self.probes if name not in PROBES]:
            raise ValueError(f"probes {unknown} are unknown; choose from {[*PROBES, ALL]}")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"--k {self.ks} must be positive numbers of neighbours, such as 20,10,200")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers} must not be negative: 0 decodes in this process")
        check_templates(self.templates)

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of what is measured, as they stand in the result."""
        tuned = () if self.fine_tune is None else ("fine_tune",)
        return (*self.probes, *tuned, *(f"few_shot_{share}_fine_tune" for share in self.fine_tune_shares))


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

    A row holds `accuracy` (of "dense" the mean IoU), its 95 % `interval`, `chance` and `n`, or the accuracy None
    and a `reason`; "fine_tune" is there when the protocols ask for it, "dropped" counts the samples left out.
    `device` is the first GPU, or the CPU without one, if left out. Raises what `read_manifests` and `load_towers` do.
    """
    folders = {"train": train, "heldout": heldout}
    manifests = read_manifests(folders)
    measured = measure_subject(open_checkpoint(step), folders, manifests, protocols, device or best_device())
    assert measured is not None, "the ranks of a process group evaluate by `python -m pretrain.evaluate`"
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
) -> Measured | None:
    """Runs the encoder once over both data sets, then the probes, then fine-tuning.

    A collective call: on several ranks each reads a share of the images, the rest is done, and given, by the first.
    """
    run, towers = subject.run, subject.towers.to(device)
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
        features[split] = gathered(work, run.max_bad, folders[split])
    if rank() > 0:
        return None
    evidence = Evidence(
        train=features["train"],
        heldout=features["heldout"],
        categories=manifests["heldout"].categories,
        facts=subject.facts,
        ks=protocols.ks,
        templates=protocols.templates,
        encode=subject.encode,
        embed=embed_with(towers, device),
        device=device,
    )
    outcomes = measure(evidence, protocols.probes)
    if protocols.fine_tune is not None:
        tune = partial(
            _fine_tune, towers, run, evidence, folders, protocols, device, f"{subject.name} fine-tuning"
        )
        outcomes["fine_tune"] = outcome_of(tune)
        for share in protocols.fine_tune_shares:
            outcomes[f"few_shot_{share}_fine_tune"] = outcome_of(partial(tune, share=share))
    return Measured(run, evidence, outcomes)


def _fine_tune(
    towers: nn.Module,
    run: Run,
    evidence: Evidence,
    folders: Mapping[str, Path],
    protocols: Protocols,
    device: torch.device,
    title: str,
    share: int | None = None,
) -> Outcome:
    """All training images, or `share` per cent of each category, drawn several times."""
    labels, num_categories = heldout_labels(evidence), len(evidence.categories)
    train, heldout = (
        Examples(folders[split], features.index[is_labelled(features)])
        for split, features in (("train", evidence.train), ("heldout", evidence.heldout))
    )
    runs_on = {"device": device, "workers": protocols.workers}
    recipe = protocols.fine_tune

    def predicted_after(rows: torch.Tensor, seed: int) -> torch.Tensor:
        some = Examples(train.folder, train.index[rows])
        told = title if share is None else f"{title}, {share} % of the labels, draw {seed}"
        settings = replace(recipe, seed=recipe.seed + seed)
        model = fine_tune(towers, run, some, num_categories, settings, title=told, **runs_on)
        return predict(model, run, heldout, **runs_on)

    if share is None:
        predicted = predicted_after(torch.arange(len(train.index)), 0)
        settings = {"train_images": len(train.index), "recipe": asdict(recipe)}
        return Outcome(score(predicted, labels, num_categories) | settings, predicted)
    train_labels = evidence.train.labels[is_labelled(evidence.train)]
    seeds = few_shot.SEEDS[: protocols.fine_tune_draws]
    row = few_shot.over_draws(train_labels, share, labels, predicted_after, num_categories, seeds)
    return Outcome(row | {"recipe": asdict(recipe)})
