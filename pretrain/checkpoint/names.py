"""Where do the checkpoints of a run lie, and which of them may be used?"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection
from pathlib import Path

from pretrain.checkpoint.store import STEP_NAME
from pretrain.checkpoint.stores import store_at
from pretrain.place import Place, place_of

PLACE_RECORD = "checkpoints.json"  # in a run's folder: where its checkpoints lie
WHOSE = ("teacher", "student")  # weights that a checkpoint holds


def checkpoints_of(out: Path) -> Path:
    """Where a run keeps its checkpoints unless it is told another place."""
    return out / "checkpoints"


def recorded_place(out: Path) -> Place | None:
    """Where the run that has its folder `out` last kept its checkpoints; None when none is recorded.

    ValueError for a damaged record.
    """
    record = out / PLACE_RECORD
    if not record.is_file():
        return None
    try:
        told = json.loads(record.read_text())["checkpoints"]
        return checkpoints_of(out) if told is None else place_of(told)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{record} is damaged ({error!r}): it must say {{"checkpoints": null, FOLDER or URL}}; write there where '
            "the run keeps them"
        ) from error


def is_known(out: Path, kept: Place) -> bool:
    """Has an earlier start kept the checkpoints of the run in `out` there? Also where `out` cannot be read now."""
    try:
        before = recorded_place(out)
    except OSError:
        return True
    return before is not None and place_name(before) == place_name(kept)


def is_gone(out: Path, kept: Place) -> bool:
    """Is the folder of --checkpoints not there that an earlier start had, as where its disk is not mounted?"""
    return (
        isinstance(kept, Path) and kept != checkpoints_of(out) and not kept.is_dir() and is_known(out, kept)
    )


def kept_of(out: Path) -> Place:
    """Where the checkpoints of a run lie that has its folder `out`, as its record tells.

    ValueError for a damaged record, and where the folder itself holds some that the record does not mean.
    """
    place, own = recorded_place(out), checkpoints_of(out)
    if place is None:  # of an older run
        return own
    if place != own and steps_in(own):
        raise ValueError(
            f"{own} holds checkpoints, and {out / PLACE_RECORD} says that the run keeps them in {place}: delete that "
            "folder, or the record, whichever is not meant"
        )
    return place


def record_place(out: Path, kept: Place) -> str:
    """What PLACE_RECORD says of a run: null for its own folder, which may be moved with it."""
    return json.dumps({"checkpoints": None if kept == checkpoints_of(out) else place_name(kept)}, indent=1)


def place_name(place: Place) -> str:
    """As a record of a run keeps it."""
    return str(place.resolve()) if isinstance(place, Path) else place


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies in a run's own folder."""
    return checkpoints_of(out) / step_name(step)


def step_name(step: int) -> str:
    """Of the folder of a checkpoint, in the place of all."""
    return f"step_{step:06d}"


def is_step(place: Place) -> bool:
    """Whether a place is one checkpoint, by its name."""
    return STEP_NAME.fullmatch(str(place).rpartition("/")[2]) is not None


def run_around(folder: Path) -> Path | None:
    """The folder of the run that keeps this checkpoint in it; None of another folder."""
    folder = Path(os.path.abspath(folder))
    run = folder.parent.parent
    return run if is_step(folder) and folder.parent == checkpoints_of(run) else None


def step_of(folder: Place) -> int:
    """Optimizer steps before a checkpoint was written, by its name."""
    match = STEP_NAME.fullmatch(str(folder).rpartition("/")[2])
    assert match, f"{folder} is no checkpoint"
    return int(match[1])


def steps_in(place: Place) -> set[int]:
    """Steps of which a checkpoint lies in a place, whole or not."""
    return {int(match[1]) for name in store_at(place).folders() if (match := STEP_NAME.fullmatch(name))}


def folder_in(place: Place, step: int) -> Place:
    """The folder of a step's checkpoint in a place."""
    return place / step_name(step) if isinstance(place, Path) else f"{place.rstrip('/')}/{step_name(step)}"


def latest(place: Place, *, hashes: bool = False, without: Collection[int] = ()) -> Place | None:
    """The newest whole checkpoint in a place, or None; warns about newer ones that are broken.

    Sizes are always compared; with `hashes` every byte is read. Steps `without` are not looked at.
    """
    for step in sorted(steps_in(place) - set(without), reverse=True):
        folder = folder_in(place, step)
        problem = store_at(folder).problem(hashes=hashes)
        if problem is None:
            return folder
        warnings.warn(f"{folder} is skipped, since {problem}: delete it", stacklevel=2)
    return None
