"""May a run go on from what lies in its folder?"""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.checkpoint import (
    PLACE_RECORD,
    is_gone,
    is_known,
    latest,
    left_out,
    place_name,
    read_json,
    recorded_place,
    steps_in,
)
from pretrain.config import Guard, Run
from pretrain.data.faults import DataAway, NobodyThere
from pretrain.evidence import Journal, Rewind
from pretrain.exits import Postponed
from pretrain.facts import DataFacts
from pretrain.given_up import given_up, tell
from pretrain.paths import Paths
from pretrain.place import Place, is_url
from pretrain.retries import is_of_address, is_passing

COUNTED = "M3I_STARTS_COUNTED"  # "1" by a job script of which a start that comes to nothing is not the first of many

HARMLESS = (
    "save_every",
    "keep_last",
    "keep_every",
    "log_every",
    "max_bad",
    "backbone.activation_checkpoint",
    *(f"guard.{field.name}" for field in dataclasses.fields(Guard)),
)  # fields of Run that may change at a resume


@contextmanager
def reaching(paths: Paths, *, is_held: bool = False) -> Iterator[None]:
    """Around what a start asks the place of the checkpoints: Postponed where it fails and another start may do.

    `is_held`: it has served this start already.
    """
    try:
        yield
    except OSError as error:
        told = what_ends(error, paths.out, paths.kept, is_held=is_held)
        if told is error:
            raise
        raise told from error


def what_ends(error: OSError, out: Path, kept: Place, *, is_held: bool = False) -> OSError:
    """Postponed where the place of the checkpoints fails and another start of the run in `out` may find it well.

    Has it never served the run, as on a machine whose disk is new, it may be a mistake in the command: then only of a
    store that is away or has no time, and where the starts of the job are counted, lest they go on for ever.
    """
    if not is_passing(error):
        return error
    if is_held or is_known(out, kept):
        served = "this start" if is_held else f"an earlier start of {out}"
        return Postponed(
            f"{kept} fails now ({error}), where {served} has found its checkpoints: nothing of them is lost; mend "
            "the place if it does not recover by itself, the same command goes on from there, as a job script that "
            "goes on after 75 does"
        )
    if not is_url(kept) or is_of_address(error):
        return error
    if os.environ.get(COUNTED) != "1":
        return OSError(
            f"{kept} fails ({error}), which has not served {out} before: mend the address if it is wrong, otherwise "
            f"start again when it answers; nothing counts the starts of this job ({COUNTED}=1 would say so), which "
            "with a wrong address would begin for ever"
        )
    return Postponed(
        f"{kept} fails now ({error}), which has not served {out} before: mend the address if it is wrong; otherwise "
        "the job script, which goes on after 75 and counts its starts, finds it well"
    )


@contextmanager
def reading(folder: Place | None) -> Iterator[None]:
    """Around a run from the checkpoint in `folder`, if any: Postponed where the place of its data is away.

    An address where no store answers, and that has served neither this machine nor the run, is more likely a mistake.
    """
    try:
        yield
    except DataAway as error:
        if isinstance(error, NobodyThere) and folder is None:
            raise
        raise Postponed(f"{error}; a job script that goes on after 75 starts it again") from error


def require_mounted(paths: Paths) -> None:
    """OSError where the place of the checkpoints is gone: in a new folder the run would begin anew."""
    if is_gone(paths.out, paths.kept):
        raise OSError(
            f"no folder is there: mount its disk, or delete {paths.out / PLACE_RECORD} to begin anew there"
        )


def require_same_place(out: Path, kept: Place) -> None:
    """ValueError when the run in `out` kept its checkpoints elsewhere, and got further there than in `kept`.

    Without them it would begin anew, and empty the log of what it did. Where they were moved to `kept`, it goes on.
    """
    before = recorded_place(out)
    if before is None or place_name(before) == place_name(kept):
        return
    there, here = (max(steps_in(place), default=-1) for place in (before, kept))
    if there > here:
        raise ValueError(
            f"the run in {out} keeps its checkpoints in {before}, up to step {there} ({out / PLACE_RECORD}); this "
            f"start keeps them in {kept}, where there are {'none' if here < 0 else f'those up to step {here}'}: name "
            f"that place by --checkpoints {before} to go on, copy them to {kept}, or begin anew with another --out; "
            f"where they were moved to {kept}, and what lies in {before} is not this run's any more, delete "
            f"{out / PLACE_RECORD}"
        )


def newest_or_none(place: Place, rewinds: Sequence[Rewind] = ()) -> Place | None:
    """The newest whole checkpoint that is not given up; None where there is none, ValueError when all are broken.

    On disk every byte is read; behind a URL sizes are compared, since a rank reads only what it needs.
    """
    gone = given_up(place, rewinds)
    tell(gone, place)
    folder = latest(place, hashes=not is_url(place), without=gone)
    if folder is None and (steps := steps_in(place)):
        broken = sorted(steps - gone)
        told = [f"none of the checkpoints of steps {broken} in {place} is whole"] if broken else []
        if gone:
            told.append(f"the run has gone back from those of steps {sorted(gone)} in {place} to older ones")
        raise ValueError(
            f"{', and '.join(told)}: copy {'older ones' if gone else 'them'} again, or delete them all to start from "
            "the beginning, or name another place"
        )
    return folder


def batches_left_out(folder: Place | None, journal: Journal) -> set[int]:
    """Numbers of those that a run does without: as its checkpoint has it and as was told since.

    At the beginning none: what an earlier run in the same folder told ends with its checkpoints.
    """
    if folder is None:
        journal.clear()
        return set()
    return left_out(folder) | journal.left_out()


def check_resumable(folder: Place, run: Run, facts: DataFacts) -> None:
    """ValueError that names every difference between the saved run and this one that forbids going on.

    Another number of ranks, ZeRO stage or precision does not.
    """
    # Read and written again, so that a field that is younger than the run has the value that it had without a name.
    kinds: dict[str, type[Run] | type[DataFacts]] = {"run": Run, "facts": DataFacts}
    saved = {
        name: json.loads(kind.from_json(json.dumps(read_json(folder, f"{name}.json"))).to_json())
        for name, kind in kinds.items()
    }
    present = {"run": json.loads(run.to_json()), "facts": json.loads(facts.to_json())}
    harmless = {f"run.{name}" for name in HARMLESS}
    counted = "facts.num_samples."  # which older checkpoints do not tell, and the manifests' SHA-256 decides
    differing = [
        _told_difference(name, old, new)
        for name, old, new in differences(saved, present)
        if name not in harmless and not name.startswith(counted)
    ]
    if differing:
        raise ValueError(
            f"{folder} was made with another recipe or other data: {'; '.join(differing)}. Go on with the same, "
            "or start anew with another --out"
        )
    if "optimizer_steps" not in read_json(folder, "state.json"):
        raise ValueError(
            f"{folder} holds DeepSpeed's own files, as an older version wrote them: go on with that "
            "version, or start anew with another --out"
        )


def _told_difference(name: str, old: Any, new: Any) -> str:
    prefix = "facts.sha256."
    if name.startswith(prefix):
        return f"what is read as {name.removeprefix(prefix)!r} has changed (other SHA-256)"
    return f"{name} was {reprlib.repr(old)}, is {reprlib.repr(new)}"


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of everything that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = f"{name}." if name else ""
        return [
            found
            for key in sorted(old.keys() | new.keys())
            for found in differences(old.get(key), new.get(key), f"{prefix}{key}")
        ]
    return [] if old == new else [(name, old, new)]
