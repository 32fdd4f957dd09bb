"""Where do the checkpoints of a run lie, and which of them may be used?"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from pretrain.checkpoint.stores import store_at
from pretrain.data.remote import Place

_STEP_NAME = re.compile(r"step_(\d{6,})")


def checkpoints_of(out: Path) -> Path:
    """Where a run keeps its checkpoints unless it is told another place."""
    return out / "checkpoints"


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies in a run's own folder."""
    return checkpoints_of(out) / step_name(step)


def step_name(step: int) -> str:
    """Of the folder of a checkpoint, in the place of all."""
    return f"step_{step:06d}"


def is_step(place: Place) -> bool:
    """Whether a place is one checkpoint, by its name."""
    return _STEP_NAME.fullmatch(str(place).rpartition("/")[2]) is not None


def step_of(folder: Place) -> int:
    """Optimizer steps before a checkpoint was written, by its name."""
    match = _STEP_NAME.fullmatch(str(folder).rpartition("/")[2])
    assert match, f"{folder} is no checkpoint"
    return int(match[1])


def steps_in(place: Place) -> set[int]:
    """Steps of which a checkpoint lies in a place, whole or not."""
    return {int(match[1]) for name in store_at(place).folders() if (match := _STEP_NAME.fullmatch(name))}


def folder_in(place: Place, step: int) -> Place:
    """The folder of a step's checkpoint in a place."""
    return place / step_name(step) if isinstance(place, Path) else f"{place.rstrip('/')}/{step_name(step)}"


def latest(place: Place, *, hashes: bool = False) -> Place | None:
    """The newest whole checkpoint in a place, or None; warns about newer ones that are broken.

    Sizes are always compared; with `hashes` every byte is read.
    """
    for step in sorted(steps_in(place), reverse=True):
        folder = folder_in(place, step)
        problem = store_at(folder).problem(hashes=hashes)
        if problem is None:
            return folder
        warnings.warn(f"{folder} is skipped, since {problem}: delete it", stacklevel=2)
    return None
