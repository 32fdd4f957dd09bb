"""Can every node write where the run writes, is there room, and do all nodes see the same there?"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.places import Place, place_of
from pretrain.checkpoint.names import is_gone
from pretrain.exits import Postponed
from pretrain.place import is_url
from pretrain.preflight.check import Here
from pretrain.preflight.machine import GIB
from pretrain.preflight.told import FAILED, WARNING, Judged, Problem, Told, size, span
from pretrain.resume import what_ends
from pretrain.retries import within

SEEN = 10.0  # seconds in which a file of one node must be seen by another
SPARE = GIB  # bytes for logs, evidence and compiled kernels
ANSWERS = 0.9  # of the seconds that a check may take, those in which a store must answer
RIGHTS = "its keys need the rights to list, read, write and delete"
NAME = ".preflight-"  # begins what is written and removed again


def folders(here: Here) -> dict[str, Path]:
    """Option -> folder that the run writes to on disk."""
    assert here.paths is not None, "only what is to be trained writes"
    found = {"--out": here.paths.out}
    kept = here.paths.checkpoints
    if isinstance(kept, Path) and kept != here.paths.out:
        found["--checkpoints"] = kept
    return found


def look_at_disk(here: Here) -> dict[str, Any] | None:
    """Free bytes by option; ValueError for what cannot be written."""
    if here.paths is None:
        return None
    free = {}
    for option, folder in folders(here).items():
        if is_gone(here.paths.out, folder):  # training says so, and ends to be started again
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"preflight")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(
                f"{option} {folder} cannot be written ({error.strerror}): mount it there, mend its owner, or name "
                "another"
            ) from error
        free[option] = shutil.disk_usage(folder).free
    return free


def checkpoint_room(num_bytes: int, keep_last: int, steps: int, keep_every: int) -> tuple[int, int]:
    """Bytes that one checkpoint takes with the one that it follows, and all of a run with one being written."""
    for_good = steps // keep_every if keep_every else 0
    return num_bytes + SPARE, num_bytes * (keep_last + 2 + for_good) + SPARE  # + step 0 and the next


def judge_disk(told: Sequence[Told], here: Here) -> Judged:
    assert here.run is not None and here.paths is not None, "only what is to be trained writes"
    num_bytes = here.model["checkpoint"] if here.model else 0
    is_remote = here.paths.checkpoints is not None and is_url(here.paths.checkpoints)
    least, wanted = (SPARE, SPARE)
    if not is_remote:
        least, wanted = checkpoint_room(num_bytes, here.run.keep_last, here.run.steps, here.run.keep_every)
    kept = "--checkpoints" if "--checkpoints" in told[0].value else "--out"
    remedy = "free some, name a larger disk by --checkpoints, or lower keep_last or raise keep_every"
    problems = [
        Problem(
            one.place,
            f"{size(free)} free for {option}",
            remedy,
            status=FAILED if free < (least if option == kept else SPARE) else WARNING,
        )
        for one in told
        for option, free in one.value.items()
        if free < (wanted if option == kept else SPARE)
    ]
    rule = f"{size(SPARE)} at least; what checkpoints take is not known, see recipe"
    if num_bytes:
        rule = f"{size(wanted)} for all checkpoints of {size(num_bytes)}, {size(least)} at least"
    free = {one.place: min(one.value.values()) / GIB for one in told}
    return Judged(f"writable, {span(free, 'GiB')} free", rule, problems)


def look_at_shared(here: Here) -> dict[str, float | None] | None:
    """Seconds until a file of the first node is seen here, None where it is not. Nothing on one node."""
    if here.ranks.nodes == 1:
        return None
    token, is_first = "", here.ranks.rank == 0
    written: list[Path] = []
    try:
        if is_first:
            token = secrets.token_hex(8)
            try:
                for folder in folders(here).values() if here.paths else ():
                    if is_gone(here.paths.out, folder):
                        continue
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / f"{NAME}{token}").write_text(token)
                    written.append(folder)
            finally:
                here.board.tell("shared", [token, len(written)])
        token, num = here.board.hear("shared")
        found: dict[str, float | None] = {}
        for option, folder in list(folders(here).items())[:num] if here.paths else ():
            found[option] = _seconds_until(folder / f"{NAME}{token}")
        return found
    finally:
        here.board.meet("shared", here.ranks.nodes)
        for folder in written:
            (folder / f"{NAME}{token}").unlink(missing_ok=True)


def _seconds_until(path: Path) -> float | None:
    begun = time.monotonic()
    while time.monotonic() - begun < SEEN:
        os.listdir(path.parent) if path.parent.is_dir() else []  # NFS asks its server again
        if path.is_file():
            return time.monotonic() - begun
        time.sleep(0.2)
    return None


def judge_shared(told: Sequence[Told], here: Here) -> Judged:
    assert here.paths is not None, "only what is to be trained writes"
    keeps_elsewhere = here.paths.checkpoints is not None
    problems = []
    for one in told:
        for option, seconds in one.value.items():
            is_needed = option == "--checkpoints" or not keeps_elsewhere
            if seconds is None:
                problems.append(
                    Problem(
                        one.place,
                        f"a file of the first node in {option} is not seen here within {SEEN:g} s",
                        "mount one shared file system at the same path everywhere, or give --checkpoints s3://..."
                        if is_needed
                        else "the watchdog cannot tell which rank of other nodes hangs: a shared --out would",
                        status=FAILED if is_needed else WARNING,
                    )
                )
    seen = {one.place: s for one in told for s in one.value.values() if s is not None}
    return Judged(
        f"seen after {span(seen, 's')}", f"one folder on all nodes, seen within {SEEN:g} s", problems
    )


def look_at_store(here: Here) -> dict[str, Any] | None:
    """Seconds that writing, listing, reading back and deleting a small object take; None without a URL.

    What fails where training would end with a code to start again: it asks the store itself.
    """
    kept = None if here.paths is None else here.paths.checkpoints
    if here.paths is None or kept is None or not is_url(kept):
        return None
    name = f"{NAME}{here.ranks.node}-{secrets.token_hex(8)}"
    begun, patience = time.monotonic(), ANSWERS * here.options.check_seconds
    try:
        within(patience, lambda: _pass_through(place_of(kept), name))
    except OSError as error:
        told = what_ends(error, here.paths.out, kept)
        if told is error:
            raise
        if not isinstance(told, Postponed):
            raise told from error
        return {"fails": str(error)}
    return {"seconds": time.monotonic() - begun}


def _pass_through(place: Place, name: str) -> None:
    """An object of this name goes in and out again; OSError where it does not."""
    content = secrets.token_bytes(64)
    place.write(name, content)
    try:
        if name not in place.names(f"{NAME}*"):
            raise OSError(f"{place}/{name} was written and is not listed: {RIGHTS}")
        if place.read(name) != content:
            raise OSError(f"{place}/{name} reads back with other bytes than were written: see the store")
    finally:
        place.remove(name)
    if name in place.names(f"{NAME}*"):
        raise OSError(f"{place}/{name} was deleted and is still there: {RIGHTS}")


def judge_store(told: Sequence[Told], here: Here) -> Judged:
    assert here.paths is not None, "only what is to be trained writes"
    seconds = {one.place: one.value["seconds"] for one in told if "seconds" in one.value}
    value = span(seconds, "s") if seconds else "fails now"
    problems = [
        Problem(one.place, one.value["fails"], "training asks it for some minutes more", status=WARNING)
        for one in told
        if "fails" in one.value
    ]
    rule = "an object is written, listed, read back and deleted"
    return Judged(f"{here.paths.checkpoints}: {value}", rule, problems)
