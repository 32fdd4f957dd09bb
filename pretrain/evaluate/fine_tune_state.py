"""Which fine-tuning does a kept state belong to?"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import training_state
from pretrain.config import Run
from pretrain.evaluate.fine_tune_order import Examples
from pretrain.evaluate.fine_tune_precision import name_of
from pretrain.evaluate.fine_tune_recipes import FineTune

WHAT = "fine-tuning"


def identity(
    towers: nn.Module,
    run: Run,
    train: Examples,
    num_categories: int,
    settings: FineTune,
    precision: torch.dtype,
) -> dict[str, Any]:
    """What a training may not differ in from the one that it goes on with, fit for JSON."""
    assert train.sha256 and train.labels is not None, "a state tells of the data that it belongs to"
    return {
        "encoder": hash_of(towers.encoder.state_dict()),
        "recipe": json.loads(json.dumps(asdict(settings))),
        "views": json.loads(json.dumps(asdict(run.views))),
        "data": data_settings(train.folder, train.sha256),
        "images": hash_of({"index": train.index}),
        "labels": hash_of({"labels": train.labels}),
        "categories": num_categories,
        "precision": name_of(precision),
    }


def data_settings(folder: Path, sha256: str) -> dict[str, str]:
    """Which data it is: a set that was built anew under its old name is another one."""
    return {"path": str(folder.resolve()), "sha256": sha256}


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and numbers: which weights, or which images, a training began with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def require_same_trainings(folder: Path, recipes: Mapping[str, FineTune], data: Mapping[str, str]) -> None:
    """ValueError when a folder of states has one of another recipe than its row's, or of other data: told before
    images are read for hours.
    """
    for path in sorted(folder.rglob("*.pt")):
        row = _row_of(path)
        if row not in recipes:  # which is not asked for this time
            continue
        recipe = json.loads(json.dumps(asdict(recipes[row])))
        settings = training_state.read(path, WHAT)["settings"]
        before = settings["recipe"] | {"seed": recipe["seed"]}  # draws of few labels have others
        training_state.require_same(path, WHAT, before, recipe)
        training_state.require_same(path, WHAT, {"data": settings["data"]}, {"data": data})


def remove_states(folder: Path, rows: Collection[str]) -> None:
    """Removes those of some rows; an interrupted training of another one can still go on."""
    for path in folder.rglob("*.pt"):
        if _row_of(path) in rows:
            path.unlink(missing_ok=True)
    for place in (*folder.glob("*/"), folder):
        with contextlib.suppress(OSError):  # it is not empty, or was never made
            place.rmdir()


def _row_of(path: Path) -> str:
    return path.stem.rpartition("_")[0]  # before the seed
