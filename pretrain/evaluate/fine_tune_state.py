"""How does a fine-tuning go on that was interrupted? By a file with all that its next step depends on."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.schema import fsync_folder
from pretrain.collectives import from_every_rank, on_every_rank

SAVE_SECONDS = 300.0  # between two states


def load(
    path: Path | None, settings: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Steps that are done, and the sum of the losses of the epoch that they end in; 0 without a state.

    A collective call. ValueError, on all ranks, for a state of a training with other settings, for a damaged one and
    where the ranks see different ones.
    """
    step, total = on_every_rank(lambda: _load(path, settings, model, optimizer))
    if len(set(steps := from_every_rank([step]))) > 1:
        raise ValueError(
            f"the ranks see fine-tunings of {steps} steps at {path}: name an --out that all machines share"
        )
    return step, total


def _load(
    path: Path | None, settings: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    if path is None or not path.is_file():
        return 0, 0.0
    state = _read(path)
    _require_same(path, state["settings"], settings)
    model.load_state_dict(state["model"])
    if state["optimizer"] is not None:
        optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["total"]


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        return {name: state[name] for name in ("settings", "model", "optimizer", "step", "total")}
    except Exception as error:  # torch and pickle raise whatever they stumble over
        raise ValueError(
            f"{path} is no sound state of a fine-tuning ({error!r}): delete it, and it begins anew"
        ) from error


def _require_same(path: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if differing := sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k)):
        key = differing[0]
        raise ValueError(
            f"{path} is the state of a fine-tuning with {key}={before.get(key)!r}, not {settings.get(key)!r} "
            f"(differing: {differing}): give the same command to go on with it, delete it, or name another --out"
        )


def save(
    path: Path,
    settings: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: int,
    total: float,
) -> None:
    """Writes the state, whole or not at all; without an optimizer of a training that is finished.

    A full disk is told, and the training goes on with the state before.
    """
    state = {
        "settings": dict(settings),
        "model": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "step": step,
        "total": total,
    }
    temporary = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch tells of a failed write by either
        temporary.unlink(missing_ok=True)
        print(f"warning: {path} could not be written ({error}); fine-tuning goes on without", file=sys.stderr)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and numbers: which weights, or which images, a training began with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def require_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """ValueError when a folder of states has one of another recipe: told before images are read for hours."""
    for path in sorted(folder.rglob("*.pt")):
        settings = _read(path)["settings"]
        before = settings["recipe"] | {"seed": recipe["seed"]}  # draws of few labels have others
        _require_same(path, before, recipe)
