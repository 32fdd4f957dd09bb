"""How do the shards of a data set behind a URL become local files? Whole, checked, and before they are needed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.files import write_atomic
from data_prep.schema import MANIFEST_NAME, Shard
from pretrain.data.cache import CACHE_GIB, PARTIAL, Cache, Full, is_at, lock_of
from pretrain.data.faults import BadSample, DataError
from pretrain.data.store import PATIENCE, Store
from pretrain.place import leads_out

PIECE = 2**24  # bytes, of one request; what fails is asked for again, not the whole shard
NOT_YET = 0.1  # seconds between two looks at what other processes do
FULL = (errno.ENOSPC, errno.EDQUOT)
AHEAD = 4  # shards that one process copies at once before they are needed


class RemoteFolder:
    """A data set behind a URL, of which `store` gives what is there now: `folder` holds copies of its small files,
    `open` gives a shard. Errors as `Store`.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        self.folder = cache.folder / "sets" / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self._forget()

    def _forget(self) -> None:
        self._bad: dict[str, tuple[str, str]] = {}  # sha256 of a shard that cannot be had -> reason, message
        self._asked: set[str] = set()
        self._needed: list[Path] = []
        self._queue: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self.store = Store(self.url, self._closed)

    def __getstate__(self) -> dict[str, object]:
        # A worker makes its own connections.
        return {"url": self.url, "cache": self.cache, "folder": self.folder}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def copy_manifest(self) -> None:
        """Fetches manifest.json, at every start: it decides what is current. Errors as `Store.manifest`."""
        self._keep(MANIFEST_NAME, self.store.manifest(self._is_known()))

    def _is_known(self) -> bool:
        return (self.folder / MANIFEST_NAME).exists()

    def copy_folder(self, name: str) -> Path:
        """Fetches all files of a folder beside the shards; where there are none, the folder does not exist.

        What it has no more is removed here too. ValueError for a name that leads out of it.
        """
        is_known = self._is_known()
        files = self.store.files(name, is_known)
        if outside := [file for file in files if leads_out(file)]:
            raise ValueError(
                f"{self.url}/{name} holds {outside[0]!r}, which would be written outside {self.folder / name}: "
                "nothing is copied; remove that object, or take the data set from those who built it"
            )
        for file in files:
            self._keep(f"{name}/{file}", self.store.content(f"{name}/{file}", is_known))
        folder = self.folder / name
        with self.cache.locked("all"):
            for path in [path for path in folder.rglob("*") if path.is_file()]:
                if path.relative_to(folder).as_posix() not in files:
                    path.unlink()
            if not files:
                shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _keep(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            with self.cache.locked("all"):
                write_atomic(path, content)

    def holds(self, shard: Shard) -> bool:
        """Is there a copy of a shard?"""
        return self.cache.path_of(shard).exists()

    def open(self, shard: Shard, release: Callable[[], None]) -> int:
        """Descriptor of the copy of a shard, made if there is none; `release` closes removed copies meanwhile.

        Raises BadSample `missing_shard`, `truncated_shard` or `changed_shard`, and DataError.
        """
        while True:
            self._fetch(shard, release)
            with contextlib.suppress(FileNotFoundError):  # removed since, to make room
                return self.cache.open(shard)

    def remove(self, shard: Shard) -> None:
        """The copy of a shard is no good: the next `open` makes another."""
        self.cache.remove(self.cache.path_of(shard))

    def fetch_ahead(self, shards: Sequence[Shard]) -> None:
        """Copies what will be needed, in that order, meanwhile; what another process copies is left to it."""
        self._needed = [self.cache.path_of(shard) for shard in shards]
        for shard in shards:
            if shard.sha256 not in self._asked:
                self._asked.add(shard.sha256)
                self._queue.put(shard)
        while len(self._threads) < AHEAD:
            self._threads.append(threading.Thread(target=self._copy_ahead, daemon=True))
            self._threads[-1].start()

    def keep_ahead(self) -> None:
        """Counts what was last asked for as used now, so that it is not removed before it is read."""
        for path in self._needed:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)

    def close(self) -> None:
        """Ends what is being copied ahead, and the waiting for room."""
        self._closed.set()

    def _copy_ahead(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Empty):
                shard = self._queue.get(timeout=1.0)
                with contextlib.suppress(BadSample, DataError, OSError):  # told when it is read
                    if not self._fetch(shard) and self.cache.path_of(shard) in self._needed:
                        self._closed.wait(NOT_YET)
                        self._queue.put(shard)  # another process is at it: see later that it is there
                        continue
                self._asked.discard(shard.sha256)

    def _fetch(self, shard: Shard, release: Callable[[], None] | None = None) -> bool:
        """Makes sure of the copy of a shard; without `release` only if nobody else is about to and there is room."""
        path = self.cache.path_of(shard)
        if shard.sha256 in self._bad:
            raise BadSample(*self._bad[shard.sha256])
        if path.exists():
            return True
        with self.cache.locked(lock_of(shard.sha256), wait=release is not None) as is_ours:
            if not is_ours or path.exists():
                return path.exists()
            try:
                return self._copy(shard, path, release)
            except BadSample as error:
                self._bad[shard.sha256] = (error.reason, str(error))
                raise

    def _copy(self, shard: Shard, path: Path, release: Callable[[], None] | None) -> bool:
        partial = path.with_suffix(PARTIAL)
        full_until, pause = None, NOT_YET
        try:
            while self._reserve(partial, shard.num_bytes, release, is_full=full_until is not None):
                self.store.require_size(shard)
                try:
                    self._copy_whole(shard, partial)
                except OSError as error:
                    if error.errno not in FULL or release is None:
                        raise
                    full_until = full_until or time.monotonic() + PATIENCE
                    if time.monotonic() > full_until or self._closed.is_set():
                        raise DataError(
                            f"{partial.parent} is full ({error}), no copy is left that may go: make room there or "
                            f"lower {CACHE_GIB}"
                        ) from error
                    self._closed.wait(pause)
                    pause = min(2 * pause, PATIENCE / 10)
                else:
                    partial.replace(path)
                    return True
            return False
        except FileNotFoundError as error:  # by whoever empties the cache: it is no fault of the shard
            raise OSError(errno.ESTALE, f"{partial} was removed while it was written") from error
        finally:
            partial.unlink(missing_ok=True)

    def _copy_whole(self, shard: Shard, partial: Path) -> None:
        """BadSample where what was copied twice is not the shard of the manifest."""
        found = self._copy_pieces(shard, partial)
        if found != shard.sha256:  # on the way, or there?
            found = self._copy_pieces(shard, partial)
        if found != shard.sha256:
            raise BadSample(
                "changed_shard",
                f"{self.url}/{shard.name} has sha256 {found}, the manifest says {shard.sha256}",
            )

    def _reserve(
        self,
        partial: Path,
        num_bytes: int,
        release: Callable[[], None] | None,
        is_full: bool,
    ) -> bool:
        """Room in the cache; with `release` it may become free within PATIENCE, else DataError, as once closed."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self.cache.reserve(partial, num_bytes, is_full=is_full)
            except Full as full:
                if release is None:
                    return False
                if time.monotonic() > until or self._closed.is_set():
                    raise DataError(str(full)) from full
                is_full = False  # what was removed is told as free once it is closed
                release()
                self._closed.wait(NOT_YET)
            else:
                return True

    def _copy_pieces(self, shard: Shard, partial: Path) -> str:
        """The sha256 of what was copied; FileNotFoundError where `partial` is no more what was written."""
        hashed = hashlib.sha256()
        with partial.open("r+b") as file:
            for start in range(0, shard.num_bytes, PIECE):
                piece = self.store.piece(shard, start, min(start + PIECE, shard.num_bytes))
                hashed.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            if not is_at(file.fileno(), partial):  # but another process', as an emptied cache has no locks
                raise FileNotFoundError(partial)
        return hashed.hexdigest()
