"""How does a fine-tuning or transfer go on that was interrupted? By a file with all that its next step depends on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.files import fsync_folder
from pretrain.collectives import from_every_rank, on_every_rank, rank, sum_over_ranks

SAVE_SECONDS = 180.0  # between two states
PARTS = ("settings", "model", "optimizer", "step", "more")


class States:
    """The state of one training at `path`, which rank 0 writes; nothing is kept where that is None.

    `settings`, fit for JSON, are what a training may not differ in from the one that it goes on with; `what` is its
    name in messages.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], what: str) -> None:
        self.path, self.settings, self.what = path, dict(settings), what
        self._saved = time.monotonic()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        """Steps that are done, and what `save` was told besides; 0 and nothing without a state.

        A collective call. ValueError, on all ranks, for a state of a training with other settings, for a damaged one
        and where the ranks see different ones.
        """
        step, more = on_every_rank(lambda: self._load(model, optimizer))
        if len(set(steps := from_every_rank([step]))) > 1:
            raise ValueError(
                f"the ranks see a {self.what} of {steps} steps at {self.path}: name an --out that all machines share"
            )
        return step, more

    def is_due(self, is_last: bool) -> bool:
        """Whether all ranks shall call `save` after this step; a collective call."""
        if self.path is None or is_last:
            return self.path is not None
        is_late = rank() == 0 and time.monotonic() - self._saved > SAVE_SECONDS
        return bool(sum_over_ranks(torch.tensor(int(is_late))))

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, step: int, more: Mapping[str, Any]
    ) -> None:
        """Writes the state on rank 0, whole or not at all; without an optimizer of a training that is finished.

        A full disk is told, and the training goes on with the state before.
        """
        assert self.path is not None, "nothing is due without a path"
        self._saved = time.monotonic()
        if rank() > 0:
            return
        own = None if optimizer is None else optimizer.state_dict()
        parts = (self.settings, model.state_dict(), own, step, dict(more))
        temporary = self.path.with_suffix(".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(dict(zip(PARTS, parts, strict=True)), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            fsync_folder(self.path.parent)
        except (OSError, RuntimeError) as error:  # torch tells of a failed write by either
            temporary.unlink(missing_ok=True)
            print(
                f"warning: {self.path} could not be written ({error}); the {self.what} goes on without",
                file=sys.stderr,
            )

    def _load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        if self.path is None or not self.path.is_file():
            return 0, {}
        state = read(self.path, self.what)
        require_same(self.path, self.what, state["settings"], self.settings)
        model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["more"]


def read(path: Path, what: str) -> dict[str, Any]:
    """PARTS of a state by name, left on the disk until they are used; ValueError for a damaged one."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        return {name: state[name] for name in PARTS}
    except Exception as error:  # torch and pickle raise whatever they stumble over
        raise ValueError(
            f"{path} is no sound state of a {what} ({error!r}): delete it, and it begins anew"
        ) from error


def require_same(path: Path, what: str, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """ValueError where the settings of a state are not those of the training that would go on from it."""
    if differing := sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k)):
        key = differing[0]
        raise ValueError(
            f"{path} is the state of a {what} with {key}={before.get(key)!r}, not {settings.get(key)!r} "
            f"(differing: {differing}): give the same command to go on with it, delete it, or name another --out"
        )
