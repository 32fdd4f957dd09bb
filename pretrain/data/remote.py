"""How do the shards of a data set behind a URL become local files? Whole, checked and within a limit of bytes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import random
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from data_prep.schema import MANIFEST_NAME, Shard, write_atomic
from pretrain.data.faults import BadSample, DataError

CACHE_FOLDER, CACHE_GIB = (
    "M3I_CACHE",
    "M3I_CACHE_GIB",
)  # environment: where copies lie, how many GiB of shards
DEFAULT_GIB = 100.0
PIECE = 2**24  # bytes, of one request; what fails is asked for again, not the whole shard
PATIENCE = 600.0  # seconds that a store may fail before the run ends
SILENT = 10.0  # seconds after which it is told that a store fails
PATIENCE_AT_START = 20.0  # seconds: a wrong address or key is told soon
FIRST_PAUSE, LONGEST_PAUSE = (
    0.1,
    30.0,
)  # seconds before an attempt is repeated: doubled each time, up to the second
AHEAD = 4  # shards that one process copies at once before they are needed
PARTIAL = ".part"
NUM_LOCKS = 256  # files that keep two processes of a machine from copying the same shard
HELD_WINDOWS = 3  # of a source: what the slowest worker reads, what the fastest reads, what comes next

Place = Path | str  # a folder, or a URL that fsspec opens
T = TypeVar("T")


def is_url(place: Place) -> bool:
    return isinstance(place, str) and "://" in place


def place_of(text: str) -> Place:
    """What a command line or a record names."""
    return text.rstrip("/") if is_url(text) else Path(text)


@dataclass(frozen=True)
class Cache:
    """Copies of shards, shared by all processes of a machine, named by their content; the least recently used go.

    ValueError for what is no number in M3I_CACHE_GIB.
    """

    folder: Path
    max_bytes: int

    @classmethod
    def of_environment(cls) -> Cache:
        """M3I_CACHE (~/.cache/m3i) and M3I_CACHE_GIB (DEFAULT_GIB)."""
        told = os.environ.get(CACHE_GIB, str(DEFAULT_GIB))
        try:
            gib = float(told)
        except ValueError:
            gib = -1.0
        if not 0 < gib < 2**40:
            raise ValueError(
                f"{CACHE_GIB}={told!r} must be a positive number, the GiB of shards to keep: such as 100"
            )
        return cls(cache_folder(), int(gib * 2**30))

    def path_of(self, shard: Shard) -> Path:
        return self.folder / "shards" / f"{shard.sha256}.tar"

    @contextlib.contextmanager
    def locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Holds the lock of a name against all threads and processes of the machine; False when it is taken."""
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        with (self.folder / "locks" / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def require_room(self, num_bytes: int) -> None:
        """ValueError unless that much may be held, and fits the disk."""
        gib = num_bytes / 2**30
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"{CACHE_GIB}={self.max_bytes / 2**30:g} is too little: {HELD_WINDOWS} windows of mixing.window "
                f"shards of each source behind a URL take {gib:.3g} GiB: raise it or lower mixing.window"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        possible = shutil.disk_usage(self.folder).free + sum(size for size, *_ in self._held())
        if num_bytes > possible:
            raise ValueError(
                f"{self.folder} has room for {possible / 2**30:.3g} GiB, {HELD_WINDOWS} windows of the sources "
                f"behind a URL take {gib:.3g}: name a larger disk by {CACHE_FOLDER} or lower mixing.window"
            )

    def reserve(self, partial: Path, num_bytes: int) -> None:
        """Makes `partial` of that size, after removing what was used longest ago; DataError when that does not do."""
        with self.locked("all"):
            held = sorted(self._held(), key=lambda file: file[1])
            total = sum(size for size, *_ in held)
            for size, _, path in held:
                if total + num_bytes <= self.max_bytes:
                    break
                if path.suffix == PARTIAL and self._is_written(path):
                    continue
                path.unlink(missing_ok=True)
                path.with_name(path.name + ".idx").unlink(missing_ok=True)
                total -= size
            if total + num_bytes > self.max_bytes:
                raise DataError(
                    f"{self.folder} holds {total} bytes that are being written, of {self.max_bytes}: raise "
                    f"{CACHE_GIB}"
                )
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.truncate(num_bytes)

    def _is_written(self, partial: Path) -> bool:
        """Is a process at work on it? One that was killed has lost its lock."""
        with self.locked(lock_of(partial.stem), wait=False) as is_ours:
            return not is_ours

    def _held(self) -> Iterator[tuple[int, float, Path]]:
        """Bytes, time of last use and path of every shard, whole or begun."""
        for path in (self.folder / "shards").glob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process removes it
                stat = path.stat()
                yield stat.st_size, stat.st_mtime, path


def lock_of(sha256: str) -> str:
    """The lock under which the copy of a shard is made."""
    return f"{int(sha256[:8], 16) % NUM_LOCKS:03d}"


def cache_folder() -> Path:
    """Where this user's machine keeps what it can make again."""
    return Path(os.environ.get(CACHE_FOLDER) or Path.home() / ".cache" / "m3i")


class RemoteFolder:
    """A data set behind a URL: `folder` holds copies of its small files, `open` gives a shard.

    A store that fails is asked again, with growing pauses, for PATIENCE seconds; then DataError. What the store says
    is missing raises FileNotFoundError.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        self.folder = cache.folder / "sets" / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self._forget()

    def _forget(self) -> None:
        self._fs: Any = None
        self._bad: dict[
            str, tuple[str, str]
        ] = {}  # sha256 of a shard that cannot be had -> reason and message
        self._asked: set[str] = set()
        self._needed: list[Path] = []
        self._queue: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()

    def __getstate__(self) -> dict[str, object]:
        return {
            "url": self.url,
            "cache": self.cache,
            "folder": self.folder,
        }  # a worker makes its own connections

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def copy_manifest(self) -> None:
        """Fetches manifest.json, at every start: it decides what is current. FileNotFoundError without one."""
        try:
            content = self._patiently(MANIFEST_NAME, lambda fs, path: fs.cat_file(path), PATIENCE_AT_START)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.url}/{MANIFEST_NAME} is missing: name the URL of a data set that `python -m data_prep "
                "build` made"
            ) from error
        self._keep(MANIFEST_NAME, content)

    def copy_folder(self, name: str) -> Path:
        """Fetches all files of a folder beside the shards; where there are none, the folder does not exist."""
        try:
            files = self._patiently(name, lambda fs, path: [file[len(path) + 1 :] for file in fs.find(path)])
        except FileNotFoundError:
            files = []
        for file in files:
            self._keep(
                f"{name}/{file}", self._patiently(f"{name}/{file}", lambda fs, path: fs.cat_file(path))
            )
        return self.folder / name

    def _keep(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            with self.cache.locked("all"):
                write_atomic(path, content)

    def sizes(self) -> dict[str, int]:
        """Bytes by name of everything beside the manifest."""
        listed = self._patiently("", lambda fs, path: fs.ls(path, detail=True))
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] or 0 for entry in listed}

    def open(self, shard: Shard) -> tuple[int, Path]:
        """Descriptor and path of the copy of a shard, which is made if there is none.

        Raises BadSample `missing_shard`, `truncated_shard` or `changed_shard`, and DataError.
        """
        path = self.cache.path_of(shard)
        while True:
            self._fetch(shard, wait=True)
            with contextlib.suppress(FileNotFoundError):  # removed since, to make room
                descriptor = os.open(path, os.O_RDONLY)
                os.utime(descriptor)  # it was used now
                return descriptor, path

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
        """Ends what is being copied ahead."""
        self._closed.set()

    def _copy_ahead(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Empty):
                shard = self._queue.get(timeout=1.0)
                with contextlib.suppress(BadSample, DataError, OSError):  # told when it is read
                    self._fetch(shard, wait=False)
                self._asked.discard(shard.sha256)

    def _fetch(self, shard: Shard, wait: bool) -> None:
        """Makes sure of the copy of a shard; without `wait` only if nobody else is about to."""
        path = self.cache.path_of(shard)
        if shard.sha256 in self._bad:
            raise BadSample(*self._bad[shard.sha256])
        if path.exists():
            return
        with self.cache.locked(lock_of(shard.sha256), wait) as is_ours:
            if not is_ours or path.exists():
                return
            try:
                self._copy(shard, path)
            except BadSample as error:
                self._bad[shard.sha256] = (error.reason, str(error))
                raise

    def _copy(self, shard: Shard, path: Path) -> None:
        partial = path.with_suffix(PARTIAL)
        try:
            self._patiently(shard.name, lambda fs, path: self._require_size(fs, path, shard))
            self.cache.reserve(partial, shard.num_bytes)
            found = self._copy_pieces(shard, partial)
            if found != shard.sha256:  # on the way, or there?
                found = self._copy_pieces(shard, partial)
            if found != shard.sha256:
                raise BadSample(
                    "changed_shard",
                    f"{self.url}/{shard.name} has sha256 {found}, the manifest says {shard.sha256}",
                )
            partial.replace(path)
        except FileNotFoundError as error:
            raise BadSample("missing_shard", f"{self.url}/{shard.name} is missing") from error
        finally:
            partial.unlink(missing_ok=True)

    def _require_size(self, fs: Any, path: str, shard: Shard) -> None:
        size = fs.info(path)["size"]
        if size != shard.num_bytes:
            raise BadSample(
                "truncated_shard",
                f"{self.url}/{shard.name} has {size} bytes, the manifest says {shard.num_bytes}",
            )

    def _copy_pieces(self, shard: Shard, partial: Path) -> str:
        """The sha256 of what was copied."""
        hashed = hashlib.sha256()
        with partial.open("r+b") as file:
            for start in range(0, shard.num_bytes, PIECE):
                piece = self._piece(shard, start, min(start + PIECE, shard.num_bytes))
                hashed.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return hashed.hexdigest()

    def _piece(self, shard: Shard, start: int, end: int) -> bytes:
        def read(fs: Any, path: str) -> bytes:
            try:
                content = fs.cat_file(path, start=start, end=end)
                if len(content) < end - start:
                    raise OSError(f"{len(content)} of {end - start} bytes came")
            except Exception:
                self._require_size(
                    fs, path, shard
                )  # a shard that became shorter meanwhile is no failing store
                raise
            return content

        content = self._patiently(shard.name, read)
        if len(content) > end - start:
            raise DataError(f"{self.url} does not serve parts of files: copy the data set to a disk or to S3")
        return content

    def _connect(self) -> tuple[Any, str]:
        """The file system and the path of the folder there; ValueError when no package knows such a URL."""
        if self._fs is None:
            try:
                self._fs = fsspec.url_to_fs(self.url, use_listings_cache=False)
            except (ValueError, ImportError) as error:
                raise ValueError(f"{self.url} cannot be opened: {error}") from error
        return self._fs

    def _patiently(self, name: str, work: Callable[[Any, str], T], patience: float = PATIENCE) -> T:
        """What `work` gives for the file system and the path of a file, repeated while the store fails."""
        fs, root = self._connect()
        told = f"{self.url}/{name}".rstrip("/")
        begun, is_told, pause = time.monotonic(), False, FIRST_PAUSE
        while True:
            try:
                return work(fs, f"{root}/{name}".rstrip("/"))
            except (FileNotFoundError, BadSample):
                raise
            except PermissionError as error:
                raise DataError(
                    f"{told} may not be read: {error}; mend the access and start again"
                ) from error
            except Exception as error:  # every store has errors of its own
                failing = time.monotonic() - begun
                if failing > SILENT and not is_told:
                    is_told = True
                    warnings.warn(
                        f"{told} fails since {failing:.0f} seconds: {error!r}; tried again for {patience:g} in all",
                        stacklevel=2,
                    )
                if failing > patience or self._closed.is_set():
                    raise DataError(
                        f"{told} has failed for {patience:g} seconds, at last with {error!r}: start again when the "
                        "store answers, nothing is lost"
                    ) from error
            self._closed.wait(random.uniform(pause / 2, pause))  # of many processes not all at once
            pause = min(2 * pause, LONGEST_PAUSE)
