"""How is a file written on while its disk is full? What finds no room is kept in memory until there is some."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data_prep.files import write_atomic

MOST_KEPT = 10_000  # records in memory; the oldest go first


def say(text: str) -> None:
    """A line on the console, as often as it comes: a warning would tell the second outage to nobody."""
    with suppress(OSError):  # which may lie on the same disk
        print(text, file=sys.stderr, flush=True)


class Appended:
    """A file to whose end one process adds records, each of which is there whole or not at all.

    No OSError comes out of it: an outage is told by `say` when it begins and when it ends. `whole`, if given, is what
    the file holds from now on instead of what it held.
    """

    def __init__(self, path: Path, say: Callable[[str], object] = say, whole: bytes | None = None) -> None:
        self._path, self._say, self._whole = path, say, whole
        self._kept: deque[bytes] = deque()
        self._num_lost = 0
        self._is_failing = False
        if whole is not None:
            self.write()

    def add(self, record: bytes) -> None:
        """Writes a record, after those that are kept."""
        self._kept.append(record)
        if len(self._kept) > MOST_KEPT:
            self._kept.popleft()
            self._num_lost += 1
        self.write()

    def write(self) -> None:
        """Tries to write what is kept, if anything."""
        if not self._kept and self._whole is None:
            return
        try:
            if self._whole is not None:
                write_atomic(self._path, self._whole)
                self._whole = None
            if self._kept:
                _append(self._path, b"".join(self._kept))
        except OSError as error:
            if not self._is_failing:
                self._say(
                    f"NOT WRITTEN: {self._path} ({error}): training goes on, and what belongs there is kept in "
                    "memory until there is room again: free space there"
                )
            self._is_failing = True
            return
        if self._is_failing:
            lost = f", but for the oldest {self._num_lost}" if self._num_lost else ""
            self._say(
                f"{self._path} is written again, with the {len(self._kept)} records that were kept{lost}"
            )
        self._kept.clear()
        self._num_lost, self._is_failing = 0, False

    def close(self) -> None:
        """Tries for the last time; what is lost then is told."""
        self.write()
        if self._is_failing:
            self._say(f"LOST: {len(self._kept) + self._num_lost} records of {self._path} that found no room")


def _append(path: Path, content: bytes) -> None:
    """Adds all of the content, or nothing: a disk that fills up may have taken a part."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        end = os.lseek(file, 0, os.SEEK_END)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(file, view) :]
        except OSError:
            os.ftruncate(file, end)
            raise
    finally:
        os.close(file)  # a network file system may tell only here that it found no room
