"""Where do copies of shards lie on this machine, and which of them go when there is no more room?"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.schema import Shard

CACHE_FOLDER = "M3I_CACHE"  # environment: where copies lie
CACHE_GIB = "M3I_CACHE_GIB"  # environment: how many GiB of shards
DEFAULT_GIB = 100.0
MOST_GIB = 2**30
HELD_WINDOWS = 3  # of a source: what the slowest worker reads, what the fastest reads, what comes next
MARGIN = 2**20  # bytes of the disk that copies leave free, for their indices and what others write meanwhile
WHOLE, PARTIAL = ".tar", ".part"  # of a copy, and of one that is not whole yet
GOING = ".going"  # of a copy removed while it was read: the disk has it back once all readers have closed it
LATE = 5.0  # seconds after which what is still read of a removed copy is no longer waited for
NUM_LOCKS = 4096  # files that keep two processes of a machine from copying the same shard


class Full(Exception):
    """There is no room for a copy now, and why."""


class Copy(NamedTuple):
    """A file of the cache."""

    path: Path
    size: int  # bytes
    taken: int  # bytes of the disk, fewer while it is written
    used: float  # when it was read last, or removed


@dataclass(frozen=True)
class Cache:
    """Copies of shards, shared by all processes of a machine, named by their content; the least recently used go.

    ValueError for what is no number in M3I_CACHE_GIB, or no place in M3I_CACHE.
    """

    folder: Path
    max_bytes: int

    @classmethod
    def of_environment(cls) -> Cache:
        """M3I_CACHE (~/.cache/m3i) and M3I_CACHE_GIB (DEFAULT_GIB)."""
        max_bytes, folder = most_bytes(), cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"{CACHE_FOLDER}={folder} must be a folder that may be written and locked ({error}): name one on a "
                "local disk"
            ) from error
        return cls(folder, max_bytes)

    def path_of(self, shard: Shard) -> Path:
        return self.folder / "shards" / f"{shard.sha256}{WHOLE}"

    def open(self, shard: Shard) -> int:
        """Descriptor of a copy, which counts as used now and as read until it is closed; FileNotFoundError."""
        path = self.path_of(shard)
        while True:
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not is_at(descriptor, path):  # removed since
                os.close(descriptor)
                continue
            if os.fstat(descriptor).st_size == shard.num_bytes:
                os.utime(descriptor)
                return descriptor
            os.close(descriptor)
            self.remove(path)  # cut off here, where the store has the whole

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
        possible = self._free() + sum(copy.taken for copy in self._copies())
        if num_bytes > possible:
            raise ValueError(
                f"{self.folder} has room for {possible / 2**30:.3g} GiB, {HELD_WINDOWS} windows of the sources "
                f"behind a URL take {gib:.3g}: name a larger disk by {CACHE_FOLDER} or lower mixing.window"
            )

    def reserve(self, partial: Path, num_bytes: int, *, is_full: bool = False) -> None:
        """Makes `partial` of that size; what was used longest ago goes, by the limit and by the disk's free space.

        Full when that is not enough. Of a disk that `is_full`, whatever it tells, only what is removed is free. What
        is removed and still read is waited for, up to LATE; then more is removed instead.
        """
        with self.locked("all"):
            partial.unlink(missing_ok=True)
            copies = [copy for copy in self._copies() if not self._is_left_over(copy)]
            whole = sorted((copy for copy in copies if copy.path.suffix == WHOLE), key=lambda copy: copy.used)
            written = [copy for copy in copies if copy.path.suffix == PARTIAL]
            removed = [copy for copy in copies if copy.path.suffix == GOING]
            going = sum(copy.taken for copy in removed if time.time() - copy.used < LATE)
            over = sum(copy.size for copy in whole + written) + num_bytes - self.max_bytes
            free = 0 if is_full else self._free() - sum(copy.size - copy.taken for copy in written)
            for copy in whole:
                if over <= 0 and num_bytes <= free + going:
                    break
                over -= copy.size
                if self._let_go(copy.path):
                    free += copy.taken
                else:
                    going += copy.taken
            if over > 0:
                raise Full(
                    f"{partial.parent} is full of shards that are being written, {CACHE_GIB} allows "
                    f"{self.max_bytes / 2**30:.3g} GiB: raise it"
                )
            if num_bytes > free:
                raise Full(
                    f"{partial.parent} has room for {max(free, 0) / 2**30:.3g} GiB, a shard takes "
                    f"{num_bytes / 2**30:.3g} and no copy is left that may go: make room on that disk, or name a "
                    f"larger one by {CACHE_FOLDER}"
                )
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.truncate(num_bytes)

    def remove(self, path: Path) -> None:
        """A shard goes with its index."""
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".idx").unlink(missing_ok=True)

    def _let_go(self, path: Path) -> bool:
        """Removes a copy; False when the disk has it back only later, since somebody reads it."""
        with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
            is_read = not _locks(file.fileno())
            if is_read:
                os.utime(file.fileno(), (time.time(),) * 2)
                path.rename(path.with_suffix(f".{os.fstat(file.fileno()).st_ino}{GOING}"))
            self.remove(path)
            return not is_read
        return True

    def _is_left_over(self, copy: Copy) -> bool:
        """Removes what nobody writes or reads any more: a process that was killed has lost its locks."""
        if copy.path.suffix == GOING:
            with contextlib.suppress(FileNotFoundError), copy.path.open("r+b") as file:
                if not _locks(file.fileno()):
                    return False
                copy.path.unlink()
            return True
        if copy.path.suffix == PARTIAL:
            with self.locked(lock_of(copy.path.stem), wait=False) as is_ours:
                if is_ours:
                    copy.path.unlink(missing_ok=True)
                return is_ours
        return False

    def _free(self) -> int:
        """Bytes that copies may take of the disk."""
        return shutil.disk_usage(self.folder).free - MARGIN

    def _copies(self) -> Iterator[Copy]:
        """Every shard, whole, begun, or removed and still read."""
        for path in (self.folder / "shards").glob("*"):
            if path.suffix not in (WHOLE, PARTIAL, GOING):
                continue  # an index goes with its shard
            with contextlib.suppress(FileNotFoundError):  # another process removes it
                stat = path.stat()
                yield Copy(path, stat.st_size, min(stat.st_size, 512 * stat.st_blocks), stat.st_mtime)


def is_at(descriptor: int, path: Path) -> bool:
    """Is this the file that has that name now?"""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:  # there is none, or its handle is stale
        return False


def _locks(descriptor: int) -> bool:
    """Takes the lock of a file, if nobody has it open; NFS gives it only of a file that is open for writing."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_of(sha256: str) -> str:
    """The lock under which the copy of a shard is made."""
    return f"{int(sha256[:8], 16) % NUM_LOCKS:04d}"


def most_bytes() -> int:
    """Bytes of shards to keep, by M3I_CACHE_GIB (DEFAULT_GIB); ValueError for what is no such number."""
    told = os.environ.get(CACHE_GIB, str(DEFAULT_GIB))
    try:
        gib = float(told)
    except ValueError:
        gib = -1.0
    if not 0 < gib < MOST_GIB:
        raise ValueError(
            f"{CACHE_GIB}={told!r} must be a positive number below {MOST_GIB}, the GiB of shards to keep: such as 100"
        )
    return int(gib * 2**30)


def cache_folder() -> Path:
    """Where this user's machine keeps what it can make again."""
    return Path(os.environ.get(CACHE_FOLDER) or Path.home() / ".cache" / "m3i")
