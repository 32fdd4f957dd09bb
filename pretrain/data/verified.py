"""Which shards of a folder have been hashed since they last changed? Each once on a machine, also across runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from data_prep.files import sha256_file
from data_prep.schema import MANIFEST_NAME, Shard
from pretrain.data.cache import cache_folder

THREAD = "m3i-verifier"
CHUNK = 2**20  # bytes hashed between two looks at the clock
LOOK_AGAIN = 600.0  # seconds between two looks at when shards changed


class Verified:
    """What is known of the shards of a folder: lines of path, bytes and time of change in the user's cache folder.

    Where that may not be written, shards are hashed at every start.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        manifest = sha256_file(folder / MANIFEST_NAME)
        self._record = cache_folder() / "verified" / f"{manifest}.jsonl"
        self._known: set[str] = set()
        with contextlib.suppress(OSError):
            self._known = set(self._record.read_text(errors="replace").splitlines())

    def check(
        self, shard: Shard, bytes_a_second: float = float("inf"), stop: threading.Event | None = None
    ) -> None:
        """ValueError when the content of a shard is not the manifest's; OSError when it cannot be read.

        A set `stop` ends it undecided.
        """
        path = self._folder / shard.name
        line = self._line(path)
        if line in self._known:
            return
        found = _sha256(path, bytes_a_second, stop or threading.Event())
        if found is None:
            return
        if found != shard.sha256:
            raise ValueError(
                f"{path} has sha256 {found}, the manifest says {shard.sha256}: "
                "the shard changed after it was built; copy it again or build the data set again"
            )
        self._known.add(line)
        with contextlib.suppress(OSError):
            self._record.parent.mkdir(parents=True, exist_ok=True)
            with self._record.open("a") as file:  # of several processes at once: short lines go in whole
                file.write(line + "\n")

    def _line(self, path: Path) -> str:
        stat = path.stat()
        return json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns])


def _sha256(path: Path, bytes_a_second: float, stop: threading.Event) -> str | None:
    hashed, begun, done = hashlib.sha256(), time.monotonic(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hashed.update(chunk)
            done += len(chunk)
            early = done / bytes_a_second - (time.monotonic() - begun)
            if stop.wait(early) if early > 0 else stop.is_set():
                return None
    return hashed.hexdigest()


Watched = tuple[Path, str, Shard]  # folder, source, shard


class Verifier:
    """Hashes shards beside the training, at most so many bytes a second, then what changes of them or of `hashed`.

    `changed` grows by what is found, each shard once.
    """

    def __init__(
        self, shards: Sequence[Watched], bytes_a_second: float, hashed: Sequence[Watched] = ()
    ) -> None:
        self.changed: list[tuple[str, Shard, str]] = []  # source, shard, what is wrong
        self._shards, self._hashed = shards, hashed
        self._rate, self._stop = bytes_a_second, threading.Event()
        self._opened: dict[Path, Verified] = {}
        self._since: dict[
            tuple[str, str], int
        ] = {}  # source, shard -> when it had changed that was looked at
        self._told: set[tuple[str, str]] = set()
        if shards or hashed:
            threading.Thread(target=self._run, name=THREAD, daemon=True).start()

    def _run(self) -> None:
        shards = self._shards
        while True:
            for one in shards:
                with contextlib.suppress(
                    OSError
                ):  # what is missing or cannot be read is told of a sample of it
                    self._look(*one)
                if self._stop.is_set():
                    return
            if self._stop.wait(LOOK_AGAIN):
                return
            shards = [*self._shards, *self._hashed]

    def _look(self, folder: Path, source: str, shard: Shard) -> None:
        place, stat = (source, shard.name), os.stat(f"{folder}/{shard.name}")
        is_whole = stat.st_size == shard.num_bytes  # else it is being copied, or its size is told
        if place in self._told or not is_whole or self._since.get(place) == stat.st_mtime_ns:
            return
        if folder not in self._opened:
            self._opened[folder] = Verified(folder)
        try:
            self._opened[folder].check(shard, self._rate, self._stop)
        except ValueError as error:
            self.changed.append((source, shard, str(error)))
            self._told.add(place)
        self._since[place] = stat.st_mtime_ns

    def close(self) -> None:
        self._stop.set()
