"""Which shards of a folder have been hashed since they last changed? Each once on a machine, also across runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from data_prep.schema import MANIFEST_NAME, Shard, sha256_file
from pretrain.data.cache import cache_folder

THREAD = "m3i-verifier"
CHUNK = 2**20  # bytes hashed between two looks at the clock


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


class Verifier:
    """Hashes shards beside the training, at most so many bytes a second; `changed` grows by what is found."""

    def __init__(self, shards: Sequence[tuple[Path, str, Shard]], bytes_a_second: float) -> None:
        self.changed: list[tuple[str, Shard, str]] = []  # source, shard, what is wrong
        self._shards, self._rate, self._stop = shards, bytes_a_second, threading.Event()
        if shards:
            threading.Thread(target=self._run, name=THREAD, daemon=True).start()

    def _run(self) -> None:
        opened: dict[Path, Verified] = {}
        for folder, source, shard in self._shards:
            try:
                if folder not in opened:
                    opened[folder] = Verified(folder)
                opened[folder].check(shard, self._rate, self._stop)
            except ValueError as error:
                self.changed.append((source, shard, str(error)))
            except OSError:  # what is missing or cannot be read is told when a sample of it is
                continue
            if self._stop.is_set():
                return

    def close(self) -> None:
        self._stop.set()
