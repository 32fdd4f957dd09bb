"""How is one place written by one process at a time? A lock on disk, a claim with a heartbeat behind a URL.

The lock dies with its process. A claim is an object that its owner writes again and again; one that stands still for
STALE seconds, or whose process is known to be gone, is taken over. Its owner may yet wake up, and where images are
downloaded two builders do not make the same bytes: so a builder reads the claim again before each shard that it puts,
and whoever writes the manifest looks whether every shard is still the one that it counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_prep.places import SWEPT, Place
from data_prep.plan import WHOLE, Part

WORK_FOLDER = ".build"  # inside a data set while it is being built
PARTS_NAME = "parts"  # in it, how many builders share the place
BEAT = 20.0  # seconds between two signs of life
STALE = 90.0  # seconds without one after which a claim is given up
WAIT = 600.0  # seconds that one waits for another to end who is about to
SETTLE = 1.0  # seconds in which a store that obeys no `If-None-Match` shows who of two came last

Require = Callable[[], None]  # raises OSError when the claim was lost; can be sent to any process


class ClaimLost(OSError):
    """Another process has taken the place over."""


@dataclass(frozen=True)
class _Claim:
    """An object of the store that says whose a place is."""

    place: Place
    name: str
    owner: str

    def is_ours(self) -> bool:
        try:
            return json.loads(self.place.child(WORK_FOLDER).read(self.name))["owner"] == self.owner
        except FileNotFoundError:
            return False

    def __call__(self) -> None:
        if not self.is_ours():
            raise ClaimLost(
                f"{self.place} was taken over by another process, since this one gave no sign for {STALE:g} seconds: "
                "let that one finish"
            )


def unclaimed() -> None:
    """Requires nothing: on disk a lock ends with its process only, and elsewhere nobody else builds."""


def agree(place: Place, part: Part) -> None:
    """Write down how many builders share a place, or ValueError when others share it in another number.

    Shares of different counts overlap, so that two builders at once would own a shard.
    """
    if part == WHOLE:
        return
    work = place.child(WORK_FOLDER)
    if work.create(PARTS_NAME, str(part.count).encode()):
        return
    if (count := work.read(PARTS_NAME).decode()) != str(part.count):
        raise ValueError(
            f"{place} was begun in {count} parts, {part} is one of {part.count}: pass --part I/{count}, or build all "
            f"that is missing by the same command without --part; when no builder runs, removing {work}/{PARTS_NAME} "
            "lets another number begin"
        )


@contextmanager
def claimed(place: Place, part: Part = WHOLE, wait: bool = False) -> Iterator[Require]:
    """One builder of the whole, or one of each part, until the block ends; call what it gives before big steps.

    While another has it: FileExistsError, or with `wait` patience, for WAIT seconds behind a URL.
    """
    if place.local is not None:
        with _locked(place.local, part, wait) as require:
            yield require
        return
    until = time.monotonic() + WAIT
    with contextlib.ExitStack() as stack:
        while True:
            try:
                require = stack.enter_context(_owned(place, part))
                break
            except FileExistsError:
                if not wait or time.monotonic() > until:
                    raise
                time.sleep(SETTLE)
        yield require


@contextmanager
def _locked(folder: Path, part: Part, wait: bool) -> Iterator[Require]:
    """The whole excludes everybody; parts exclude their like, and are together shared owners of the whole."""
    work = folder / WORK_FOLDER
    with contextlib.ExitStack() as stack:
        names = {"lock": fcntl.LOCK_EX}
        if part != WHOLE:
            names = {"lock": fcntl.LOCK_SH, f"lock-{part.index}-of-{part.count}": fcntl.LOCK_EX}
        for name, kind in names.items():
            lock = stack.enter_context(_opened(work / name))
            try:
                fcntl.flock(lock, kind if wait else kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FileExistsError(
                    f"{folder} is being written by another process: wait until it ends"
                ) from error
        yield unclaimed


def _opened(lock: Path) -> IO[str]:
    for _ in range(SWEPT):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return open(lock, "a")
    return open(lock, "a")


@contextmanager
def _owned(place: Place, part: Part) -> Iterator[Require]:
    name = "claim" if part == WHOLE else f"claim-{part.index}-of-{part.count}"
    work = place.child(WORK_FOLDER)
    there = work.names("claim*")
    for other in there if part == WHOLE else sorted({"claim", name} & set(there)):
        _remove_if_dead(work, other)
    mine = {
        "owner": uuid.uuid4().hex,
        "machine": _machine(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }

    claim = _Claim(place, name, mine["owner"])
    is_taken = not work.create(name, json.dumps({**mine, "beat": 0}).encode())
    time.sleep(0 if is_taken else SETTLE)
    if is_taken or not claim.is_ours():
        raise FileExistsError(f"{place} is being written by another process: wait until it ends")
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(work, name, mine, claim, ended), daemon=True)
    heart.start()
    try:
        yield claim
    finally:
        ended.set()
        heart.join()
        with contextlib.suppress(OSError):  # a store that fails now: the claim goes stale
            if claim.is_ours():
                work.remove(name)


def _beat(
    work: Place,
    name: str,
    mine: dict[str, object],
    claim: _Claim,
    ended: threading.Event,
) -> None:
    beat = 0
    while not ended.wait(BEAT):
        beat += 1
        with contextlib.suppress(OSError):  # the work itself will say that the store fails
            if not claim.is_ours():
                return
            work.write(name, json.dumps({**mine, "beat": beat}).encode())


def _remove_if_dead(work: Place, name: str) -> None:
    """Remove the claim of a builder that is gone; FileExistsError when it lives."""
    try:
        content = work.read(name)
    except FileNotFoundError:
        return
    owner = json.loads(content)
    if owner["machine"] == _machine() and not os.path.exists(f"/proc/{owner['pid']}"):
        work.remove(name)
        return
    told = f"process {owner['pid']} on {owner['host']}"
    print(f"{work} is claimed by {told}: waits up to {STALE:g} s for a sign of life", file=sys.stderr)
    until = time.monotonic() + STALE
    while time.monotonic() < until:
        time.sleep(min(1.0, STALE / 10))
        try:
            now = work.read(name)
        except FileNotFoundError:
            return
        if now != content:
            raise FileExistsError(f"{work} is being written by {told}: wait until it ends")
    work.remove(name)


def _machine() -> str:
    """Where a process number means the same process: host, boot and namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # not told here: nobody's
