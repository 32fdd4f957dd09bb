"""Which checkpoint of a run does a name mean?"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint import folder_in, kept_of, step_of, steps_in
from pretrain.checkpoint.fetch import fetched
from pretrain.checkpoint.names import step_name
from pretrain.checkpoint.stores import store_at
from pretrain.collectives import from_every_rank, from_first_rank, on_every_rank, rank
from pretrain.command import no_folder
from pretrain.given_up import given_up_by
from pretrain.intact import COMPLETE, identity
from pretrain.place import Place

UNTOLD = "does not tell of which weights it is"  # a result of before, or of no checkpoint
COPIES = "fetched"  # folder of a run: what was copied from the URL where its checkpoints lie


def find_checkpoint(run_folder: Path, name: str, which: str = "teacher") -> Path:
    """Folder on this machine of the checkpoint that `locate` finds; a collective call, as `bring`."""
    return bring(run_folder, [on_every_rank(lambda: locate(run_folder, name))], which)[0]


def bring(run_folder: Path, places: Sequence[Place], which: str = "teacher") -> list[Path]:
    """Folders on this machine of checkpoints that all ranks have located; a collective call.

    What lies behind a URL is copied by the first rank as far as `which`, "teacher" or "student", needs it. Raises
    ValueError where the ranks have located others, and what `fetched` raises, on all of them.
    """
    told = from_every_rank([[str(place) for place in places]])
    if odd := [number for number, found in enumerate(told) if found != told[0]]:
        raise ValueError(
            f"rank {odd[0]} finds the checkpoints {told[odd[0]]}, and rank 0 {told[0]}: start all ranks with one "
            "command, and name a step by its number while a run still writes newer ones"
        )
    for place in places:
        if not isinstance(place, Path):
            from_first_rank(lambda: fetched(place, which, local_of(run_folder, place)))  # noqa: B023  called at once
    return [local_of(run_folder, place) for place in places]


def local_of(run_folder: Path, place: Place) -> Path:
    """Where a checkpoint lies on this machine once `bring` has brought it."""
    return place if isinstance(place, Path) else run_folder / COPIES / step_name(step_of(place))


def locate(run_folder: Path, name: str) -> Place:
    """Where the checkpoint "first" (step 0, before any training), "last" (the newest whole one) or a step lies.

    The last is the newest that was written to its end, but for those from which the run has gone back to an older one
    (pretrain/given_up.py); both those and newer ones without an end are told. Where it is damaged, no older one
    passes for it. They are looked for where the run kept them. Raises FileNotFoundError (no run, no such checkpoint,
    or not whole) and ValueError (no such name).
    """
    if not run_folder.is_dir():
        raise FileNotFoundError(f"{no_folder(run_folder)}: name the --out folder of a pre-training run")
    if name not in ("first", "last") and not name.isdecimal():
        raise ValueError(
            f"step {name!r} is unknown; choose from ['first', 'last'] or give a number such as 400"
        )
    place = kept_of(run_folder)
    steps = steps_in(place)
    if name == "last" or not steps:
        finished = [step for step in steps if _is_finished(folder_in(place, step))]
        if not finished:
            raise FileNotFoundError(
                f"{run_folder} holds no whole checkpoint: name the --out folder of `deepspeed pretrain/main.py`, "
                f"after its first checkpoint was written (they are kept in {place})"
            )
        good = set(finished) - given_up_by(run_folder, place)
        if not good:
            raise FileNotFoundError(
                f"{run_folder} has gone back from all checkpoints that are left in {place}: wait for its next one, "
                f"or name one of them by its step, of {sorted(finished)}"
            )
        step = max(good)  # an older one in its place would pass for it
    else:
        step = 0 if name == "first" else int(name)
    found = _whole(place, step)
    if name == "last" and rank() == 0:
        _tell_unfinished(place, steps, step)
    return found


def weights_of(step: Path) -> str:
    """SHA-256 of the teacher of a checkpoint: a run that began anew has others under the same name."""
    return identity(step, "teacher/")


def unlike(evaluation: Mapping[str, Any], step: Path) -> str:
    """Why what a result says under the name of a checkpoint is not said of its weights; nothing where it is."""
    weights = (evaluation.get("weights") or {}).get(step.name)
    if weights == weights_of(step):
        return ""
    return UNTOLD if weights is None else f"is of another {step.name}"


def _tell_unfinished(place: Place, steps: Collection[int], used: int) -> None:
    """One line on newer checkpoints than the one that is used, if there are some without an end."""
    newer = (step for step in sorted(steps) if step > used)
    if names := ", ".join(step_name(step) for step in newer if not _is_finished(folder_in(place, step))):
        print(
            f"{names} in {place}: passed over, since there is no {COMPLETE} (still being written, never finished, or "
            f"not copied whole); {step_name(used)} is used",
            file=sys.stderr,
            flush=True,
        )


def _is_finished(folder: Place) -> bool:
    """Whether a checkpoint was written to its end, whatever became of it since."""
    return COMPLETE in store_at(folder).sizes()


def _whole(place: Place, step: int) -> Place:
    """The checkpoint of a step; FileNotFoundError that names the whole ones unless it is one of them."""
    folder, steps = folder_in(place, step), steps_in(place)
    problem = store_at(folder).problem(hashes=False) if step in steps else "there is none"
    if problem is None:
        return folder
    whole = [one for one in sorted(steps) if store_at(folder_in(place, one)).problem(hashes=False) is None]
    remedy = (
        f"choose one of the whole ones, steps {whole}"
        if whole
        else "the run holds no whole checkpoint: name another run"
    )
    raise FileNotFoundError(f"{folder} cannot be used, since {problem}: {remedy}")
