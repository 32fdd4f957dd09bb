"""What do the chosen protocols say of one checkpoint?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_prep.schema import Manifest
from pretrain.checkpoint import load_towers
from pretrain.config import Run
from pretrain.data.text import Captions
from pretrain.evaluate import dense, result
from pretrain.evaluate.accuracy import score
from pretrain.evaluate.features import extract
from pretrain.evaluate.fine_tune import Examples, FineTune, fine_tune, predict
from pretrain.evaluate.probes import (
    PROBES,
    Evidence,
    Outcome,
    heldout_labels,
    is_labelled,
    measure,
    outcome_of,
)
from pretrain.evaluate.templates import AUTO, check_templates
from pretrain.towers import Towers

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Protocols:
    """What is measured, and how."""

    probes: tuple[str, ...] = tuple(PROBES)
    ks: tuple[int, ...] = (20, 10, 200)  # neighbours of kNN; the first stands in the table
    templates: str = AUTO  # of zero-shot classification
    fine_tune: FineTune | None = None  # None: not fine-tuned, which costs a training
    workers: int = 0  # processes that decode images; 0: this one

    def __post_init__(self) -> None:
        if unknown := [name for name in self.probes if name not in PROBES]:
            raise ValueError(f"probes {unknown} are unknown; choose from {list(PROBES)}")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"--k {self.ks} must be positive numbers of neighbours, such as 20,10,200")
        check_templates(self.templates)


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
    measured = measure_checkpoint(step, folders, manifests, protocols, device or best_device())
    return result.of_checkpoint(measured.evidence, measured.outcomes)


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_checkpoint(
    step: Path,
    folders: Mapping[str, Path],
    manifests: Mapping[str, Manifest],
    protocols: Protocols,
    device: torch.device,
) -> Measured:
    """Runs the encoder once over both data sets, then the probes, then fine-tuning."""
    run, facts, towers = load_towers(step)
    towers.to(device)
    samplings = {"train": dense.TRAIN, "heldout": dense.HELDOUT}
    features = {
        split: extract(
            towers,
            run,
            folders[split],
            device=device,
            workers=protocols.workers,
            title=f"{step.name} {split}",
            dense=samplings[split] if "dense" in protocols.probes else dense.NOTHING,
        )
        for split in SPLITS
    }

    @torch.inference_mode()
    def embed(tokens: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return towers.embed_texts(tokens.to(device), token_mask.to(device))

    evidence = Evidence(
        train=features["train"],
        heldout=features["heldout"],
        categories=manifests["heldout"].categories,
        facts=facts,
        ks=protocols.ks,
        templates=protocols.templates,
        encode=Captions(step / "tokenizer", run.text.length).encode if facts.vocab_size else None,
        embed=embed,
    )
    outcomes = measure(evidence, protocols.probes)
    if protocols.fine_tune is not None:
        tune = partial(
            _fine_tune, towers, run, evidence, folders, protocols, device, f"{step.name} fine-tuning"
        )
        outcomes["fine_tune"] = outcome_of(tune)
    return Measured(run, evidence, outcomes)


def _fine_tune(
    towers: Towers,
    run: Run,
    evidence: Evidence,
    folders: Mapping[str, Path],
    protocols: Protocols,
    device: torch.device,
    title: str,
) -> Outcome:
    labels, num_categories = heldout_labels(evidence), len(evidence.categories)
    train, heldout = (
        Examples(folders[split], features.index[is_labelled(features)])
        for split, features in (("train", evidence.train), ("heldout", evidence.heldout))
    )
    runs_on = {"device": device, "workers": protocols.workers}
    model = fine_tune(towers, run, train, num_categories, protocols.fine_tune, title=title, **runs_on)
    predicted = predict(model, run, heldout, **runs_on)
    settings = {"train_images": len(train.index), "recipe": asdict(protocols.fine_tune)}
    return Outcome(score(predicted, labels, num_categories) | settings, predicted)


def read_manifests(folders: Mapping[str, Path]) -> dict[str, Manifest]:
    """Manifests of both data sets; ValueError when they do not fit each other."""
    manifests = {split: Manifest.read(folder) for split, folder in folders.items()}
    train, heldout = (manifests[split] for split in SPLITS)
    if train.categories != heldout.categories:
        odd = sorted(set(train.categories) ^ set(heldout.categories)) or ["the same names in another order"]
        raise ValueError(
            f"{folders['train']} has {len(train.categories)} categories, {folders['heldout']} has "
            f"{len(heldout.categories)}, and they must be the same (differing: {odd[:5]}): build both splits "
            "from one source"
        )
    if not train.categories and not heldout.has_text:
        raise ValueError(
            f"{folders['heldout']} has neither categories nor captions, so there is nothing to measure: "
            "name another data set"
        )
    return manifests
