"""Where do copies of shards lie on this machine, and which of them go when there is no more room?"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.schema import Shard

CACHE_FOLDER = "M3I_CACHE"  # environment: where copies lie
CACHE_GIB = "M3I_CACHE_GIB"  # environment: how many GiB of shards
DEFAULT_GIB = 100.0
MOST_GIB = 2**30
HELD_WINDOWS = 3  # of a source: what the slowest worker reads, what the fastest reads, what comes next
PARTIAL = ".part"  # of a copy that is not whole yet
NUM_LOCKS = 4096  # files that keep two processes of a machine from copying the same shard


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
        told = os.environ.get(CACHE_GIB, str(DEFAULT_GIB))
        try:
            gib = float(told)
        except ValueError:
            gib = -1.0
        if not 0 < gib < MOST_GIB:
            raise ValueError(
                f"{CACHE_GIB}={told!r} must be a positive number below {MOST_GIB}, the GiB of shards to keep: "
                "such as 100"
            )
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"{CACHE_FOLDER}={folder} must be a folder that may be written ({error}): name one on a local disk"
            ) from error
        return cls(folder, int(gib * 2**30))

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

    def reserve(self, partial: Path, num_bytes: int) -> bool:
        """Makes `partial` of that size and removes what was used longest ago; False when others write too much."""
        with self.locked("all"):
            partial.unlink(missing_ok=True)
            held = sorted(self._held(), key=lambda file: file[1])
            total = sum(size for size, *_ in held)
            for size, _, path in held:
                if total + num_bytes <= self.max_bytes:
                    break
                if path.suffix == PARTIAL and self._is_written(path):
                    continue
                self.remove(path)
                total -= size
            if total + num_bytes > self.max_bytes:
                return False
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.truncate(num_bytes)
            return True

    def remove(self, path: Path) -> None:
        """A shard goes with its index."""
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".idx").unlink(missing_ok=True)

    def _is_written(self, partial: Path) -> bool:
        """Is a process at work on it? One that was killed has lost its lock."""
        with self.locked(lock_of(partial.stem), wait=False) as is_ours:
            return not is_ours

    def _held(self) -> Iterator[tuple[int, float, Path]]:
        """Bytes, time of last use and path of every shard, whole or begun."""
        for path in (self.folder / "shards").glob("*"):
            if path.suffix not in (".tar", PARTIAL):
                continue  # an index goes with its shard
            with contextlib.suppress(FileNotFoundError):  # another process removes it
                stat = path.stat()
                yield stat.st_size, stat.st_mtime, path


def lock_of(sha256: str) -> str:
    """The lock under which the copy of a shard is made."""
    return f"{int(sha256[:8], 16) % NUM_LOCKS:04d}"


def cache_folder() -> Path:
    """Where this user's machine keeps what it can make again."""
    return Path(os.environ.get(CACHE_FOLDER) or Path.home() / ".cache" / "m3i")
