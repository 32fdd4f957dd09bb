"""What do the files of shards hold of a sample, also while their file system fails now and then?"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from data_prep.files import FILE, kind_of
from data_prep.index import index_path
from data_prep.schema import MANIFEST_NAME, Shard
from pretrain.data.cache import CACHE_FOLDER, is_at
from pretrain.data.damage import OF_DAMAGE, can_be_read_elsewhere
from pretrain.data.faults import BadSample, DataAway, DataError
from pretrain.data.records import offsets_of
from pretrain.data.remote import RemoteFolder
from pretrain.data.store import PATIENCE
from pretrain.retries import OF_NAMES, GaveUp, patiently

LONGEST_PAUSE = 5.0  # seconds between two attempts to read a file
LOOK = 0.2  # seconds between two looks at which copies the cache removed
DAMAGED_FOR = 120.0  # seconds that one place of a file fails before it counts as damaged, once a file
ANOTHER_COPY = "or copy it again, or remove it to have its samples replaced"
ANOTHER_DISK = f"or name another disk by {CACHE_FOLDER}"
T = TypeVar("T")


class OpenShards:
    """Files of the shards in a folder, or of their copies where `remote` has them; the `most` used last stay open.

    A file system that fails is no property of the data: the file is opened and read again, since its handle may be
    stale, for PATIENCE seconds; then DataAway. One place that fails while others of its file can be read makes a
    BadSample `unreadable`; of a copy, another copy.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], remote: RemoteFolder | None, most: int) -> None:
        self._folder, self._shards, self._remote, self._most = folder, shards, remote, most
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()  # of what is open: it is closed beside the reading too
        self._closer: threading.Thread | None = None
        self._open: dict[int, tuple[int, array]] = {}  # shard -> descriptor, offsets; used longest ago first
        self._bad: dict[int, tuple[str, str]] = {}  # shard that cannot be used -> reason and message
        self._damaged: set[int] = set()  # shards with samples that were unreadable

    def __getstate__(self) -> tuple:
        return self._folder, self._shards, self._remote, self._most  # a worker process opens its own files

    def __setstate__(self, state: tuple) -> None:
        self._folder, self._shards, self._remote, self._most = state
        self._forget()

    def path(self, shard: int) -> Path:
        """The file of a shard; of one behind a URL its copy."""
        named = self._shards[shard]
        return self._folder / named.name if self._remote is None else self._remote.cache.path_of(named)

    def record(self, shard: int, index: int, *, is_patient: bool = True) -> bytes:
        """The bytes of one sample; raises BadSample and DataError, or without patience the first OSError."""
        try:
            return self._record(shard, index)
        except OSError:
            if not is_patient:
                raise
        return self._record_again(shard, index)

    def close(self) -> None:
        with self._lock:
            for shard in list(self._open):
                self._close(shard)

    def close_removed(self) -> None:
        """Closes copies that the cache removed: the disk has them back only then."""
        with self._lock:
            for shard, (descriptor, _) in list(self._open.items()):
                if self._remote is not None and not is_at(descriptor, self.path(shard)):
                    self._close(shard)

    def _close_removed_beside(self) -> None:
        """The same again and again while any is open: others wait for the room, also while nothing is read here."""
        while True:
            time.sleep(LOOK)
            with self._lock:
                self.close_removed()
                if not self._open:
                    self._closer = None
                    return

    def _close(self, shard: int) -> None:
        with self._lock, contextlib.suppress(KeyError, OSError):  # it was only read: nothing is lost
            os.close(self._open.pop(shard)[0])

    def _record(self, shard: int, index: int) -> bytes:
        with self._lock:
            if shard in self._open and self._remote is None and _is_removed(self._open[shard][0]):
                self._close(shard)  # a start that goes on from here finds what has its name now, so do these
            if shard in self._open:
                self._open[shard] = self._open.pop(shard)  # the last that was used
                return self._read(shard, index)
        opened = self._open_another(shard)  # without the lock: others may wait for room that is open here
        with self._lock:
            self._open[shard] = opened
            if self._remote is not None and self._closer is None:
                self._closer = threading.Thread(target=self._close_removed_beside, daemon=True)
                self._closer.start()
            return self._read(shard, index)

    def _read(self, shard: int, index: int) -> bytes:
        descriptor, offsets = self._open[shard]
        start, size = offsets[index], offsets[index + 1] - offsets[index]
        record = os.pread(descriptor, size, start)
        while len(record) < size:  # it ends here, or the next place fails: another read tells
            more = os.pread(descriptor, size - len(record), start + len(record))
            if not more:
                missing = size - len(record)
                raise BadSample(
                    "truncated_shard",
                    f"{self.path(shard)} ended {missing} bytes before the end of sample {index}",
                )
            record += more
        return record

    def _record_again(self, shard: int, index: int) -> bytes:
        since, is_copied_again = time.monotonic(), False

        def attempt() -> bytes:
            nonlocal is_copied_again
            self._close(shard)
            try:
                return self._record(shard, index)
            except OSError as error:
                is_known = shard in self._damaged
                if error.errno in OF_DAMAGE and (is_known or time.monotonic() - since >= DAMAGED_FOR):
                    if self._remote is None:
                        self._require_undamaged(shard, index, error)
                    elif not is_copied_again:
                        is_copied_again = True
                        self._remote.remove(self._shards[shard])
                raise

        remedy = ANOTHER_COPY if self._remote is None else ANOTHER_DISK
        return of_file(attempt, self.path(shard), PATIENCE, remedy)

    def _require_undamaged(self, shard: int, index: int, error: OSError) -> None:
        """BadSample if the place of a sample is damaged, or of a header in a shard without an index."""
        path = self.path(shard)
        if not can_be_read_elsewhere(path, self._shards[shard].num_bytes):
            return
        if shard in self._open:
            self._damaged.add(shard)
            raise BadSample("unreadable", f"{path}, sample {index}: {error}; others can be read") from error
        self._bad[shard] = ("broken_index", f"{path} has no index and cannot get one: {error}")
        raise BadSample(*self._bad[shard]) from error

    def _open_another(self, number: int) -> tuple[int, array]:
        if number in self._bad:
            raise BadSample(*self._bad[number])
        with self._lock:
            if len(self._open) >= self._most:
                self._close(next(iter(self._open)))
        try:
            descriptor = self._descriptor(number)
            try:
                if (kind := kind_of(os.fstat(descriptor).st_mode)) != FILE:
                    raise BadSample("missing_shard", f"{self.path(number)} is {kind}, not a file")
                return descriptor, self._offsets(descriptor, number)
            except BaseException:
                os.close(descriptor)
                raise
        except BadSample as error:  # it would take as long to find that again for each of its samples
            self._bad[number] = (error.reason, str(error))
            raise
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # of the machine: the shard may be good
                raise DataError(f"{error}: raise the limit (`ulimit -n`) or lower mixing.window") from error
            raise

    def _offsets(self, descriptor: int, number: int) -> array:
        path, shard = self.path(number), self._shards[number]
        try:
            return offsets_of(descriptor, path, shard)
        except BadSample:
            if self._remote is None:
                raise
        index_path(path).unlink(missing_ok=True)  # of a copy it was made here, and the copy is whole
        return offsets_of(descriptor, path, shard)

    def _descriptor(self, number: int) -> int:
        if self._remote is not None:
            self.close_removed()
            return self._remote.open(self._shards[number], self.close_removed)
        try:
            return os.open(self.path(number), os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        except OSError as error:
            if error.errno not in (errno.ENOENT, *OF_NAMES):
                raise
            if not (self._folder / MANIFEST_NAME).exists():  # all of it is away
                raise OSError(f"{self._folder} has no {MANIFEST_NAME} any more: is it mounted?") from error
            raise BadSample("missing_shard", str(error)) from error


def _is_removed(descriptor: int) -> bool:
    try:
        return os.fstat(descriptor).st_nlink == 0
    except OSError:  # its handle is stale
        return True


def of_file(work: Callable[[], T], path: Path, seconds: float, remedy: str = ANOTHER_COPY) -> T:
    """What `work` gives of a file, done again while its file system fails; then DataAway."""
    try:
        return patiently(work, str(path), seconds, final=(ValueError,), longest=LONGEST_PAUSE)
    except PermissionError as error:
        raise DataError(f"{path} may not be read: {error}; mend the access and start again") from error
    except GaveUp as error:
        raise DataAway(
            f"{error.strerror}: start again when it can be read, {remedy}; nothing is lost"
        ) from error
