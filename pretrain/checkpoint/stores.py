"""How are the files of a checkpoint written and read alike, on disk and behind any URL that fsspec opens?

On disk a checkpoint is written to a hidden folder, flushed and renamed. A store has no renaming, but an object there
appears when its upload is complete: its files get their final names, and COMPLETE, without which nothing is used,
comes last. A store that fails is asked again, with growing pauses, for PATIENCE seconds, and one that does not answer
what only reads after ATTEMPT seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from pretrain import intact
from pretrain.checkpoint.store import PIECE, STEP_NAME, Content, Store, problem_of
from pretrain.data.store import ATTEMPT
from pretrain.place import Place, is_url
from pretrain.retries import patiently

PART = 50 * 2**20  # bytes, of one part of an upload
PATIENCE = 300.0  # seconds that a store may fail before a save, or the start of a run, is given up
HIDDEN = ".tmp-"  # begins the names of folders that are not finished
T = TypeVar("T")


def store_at(place: Place) -> Store:
    """The store of a folder or URL; ValueError for a URL that no installed package opens."""
    return Remote(str(place)) if is_url(place) else Disk(Path(place))


def read_json(folder: Place, name: str) -> Any:
    """What a JSON file of a checkpoint says; FileNotFoundError without it."""
    return json.loads(store_at(folder).read(name))


def left_out(folder: Place) -> set[int]:
    """Numbers of the batches that a run had left out of its order when it was saved."""
    return set(read_json(folder, "state.json").get("guard", {}).get("left_out", ()))


class Disk:
    """On a file system that all ranks see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def child(self, name: str) -> Disk:
        return Disk(self.folder / name)

    def folders(self) -> list[str]:
        return [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []

    def sizes(self) -> dict[str, int]:
        return {name: (self.folder / name).stat().st_size for name in intact.files_in(self.folder)}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        with (self.folder / name).open("rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size if end is None else end
            content = bytearray(end - start)
            view, done = memoryview(content), 0
            while done < len(content) and (num := os.preadv(file.fileno(), [view[done:]], start + done)):
                done += num
        if done < len(content):
            raise OSError(f"{self.folder / name} ends after {start + done} bytes, {end} were expected")
        return content

    def write(self, name: str, content: Content) -> None:
        path, view = self.folder / name, memoryview(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(view), PIECE):
                piece, done = view[start : start + PIECE], 0
                while done < len(piece):  # a disk may take a part
                    done += file.write(piece[done:])
            os.fsync(file.fileno())
            # What is read back then comes from the disk, and the memory stays for the data.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def room(self) -> int | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.folder).free

    def begin(self, name: str, attempt: str) -> None:
        (self._hidden(name, attempt)).mkdir(parents=True)

    def unfinished(self, name: str, attempt: str) -> Disk:
        return Disk(self._hidden(name, attempt))

    def publish(self, name: str, attempt: str, digests: intact.Digests) -> None:
        intact.publish(self._hidden(name, attempt), self.folder / name, digests)

    def remove(self, name: str) -> None:
        gone = self.folder / f"{HIDDEN}{name}.removed"
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).rename(gone)
            shutil.rmtree(gone)

    def give_up(self, name: str, attempt: str) -> None:
        shutil.rmtree(self._hidden(name, attempt), ignore_errors=True)

    def recover(self) -> None:
        for replaced in self.folder.glob(f"{HIDDEN}*.replaced"):
            name = STEP_NAME.search(replaced.name)
            if name and not (self.folder / name[0]).exists():
                os.rename(replaced, self.folder / name[0])

    def tidy(self) -> None:
        self.recover()
        for left_over in self.folder.glob(f"{HIDDEN}*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def problem(self, *, hashes: bool, of: str = "") -> str | None:
        return problem_of(self, hashes, of)

    def _hidden(self, name: str, attempt: str) -> Path:
        return self.folder / f"{HIDDEN}{name}-{attempt}"


class Remote:
    """Behind a URL. Each call of the store is repeated while it fails; then OSError."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def child(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    def folders(self) -> list[str]:
        def ask(fs: Any, path: str) -> list[str]:
            found = fs.ls(path, detail=True)
            return [one["name"].rstrip("/").rpartition("/")[2] for one in found if one["type"] == "directory"]

        with contextlib.suppress(FileNotFoundError):
            return self._patiently("", ask, ATTEMPT)
        return []

    def sizes(self) -> dict[str, int]:
        def ask(fs: Any, path: str) -> dict[str, int]:
            inside = len(path) + 1
            return {name[inside:]: one["size"] for name, one in fs.find(path, detail=True).items()}

        with contextlib.suppress(FileNotFoundError):
            return self._patiently("", ask, ATTEMPT)
        return {}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        def ask(fs: Any, path: str) -> bytearray:
            content = bytearray(fs.cat_file(path, start=start or None, end=end))
            if end is not None and len(content) != end - start:
                raise OSError(f"{len(content)} bytes came where {end - start} were asked for")
            return content

        return self._patiently(name, ask, ATTEMPT)

    def write(self, name: str, content: Content) -> None:
        options = {"chunksize": PART} if self.url.startswith(("s3://", "s3a://")) else {}
        self._patiently(name, lambda fs, path: fs.pipe_file(path, content, **options))

    def room(self) -> int | None:
        return None

    def begin(self, name: str, attempt: str) -> None:
        self._forget(f"{name}/{intact.COMPLETE}")  # of an older checkpoint of this step

    def unfinished(self, name: str, attempt: str) -> Remote:
        return self.child(name)

    def publish(self, name: str, attempt: str, digests: intact.Digests) -> None:
        self.write(f"{name}/{intact.COMPLETE}", intact.mark_text(digests).encode())

    def remove(self, name: str) -> None:
        self._forget(f"{name}/{intact.COMPLETE}")
        with contextlib.suppress(FileNotFoundError):
            self._patiently(name, lambda fs, path: fs.rm(path, recursive=True))

    def give_up(self, name: str, attempt: str) -> None:
        pass  # it has no COMPLETE and `tidy` removes it: a store that fails is not asked again for that

    def recover(self) -> None:
        pass  # nothing is renamed there

    def tidy(self) -> None:
        for name in self.folders():
            if STEP_NAME.fullmatch(name) and intact.COMPLETE not in self.child(name).sizes():
                self.remove(name)  # other folders of a bucket are not ours

    def problem(self, *, hashes: bool, of: str = "") -> str | None:
        return problem_of(self, hashes, of)

    def _forget(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._patiently(name, lambda fs, path: fs.rm_file(path))

    def _patiently(self, name: str, work: Callable[[Any, str], T], attempt: float | None = None) -> T:
        """What `work` gives for the file system and the path of a file, repeated while the store fails.

        What only reads may take `attempt` seconds at first; anything else takes as long as it does, since what was
        left behind would be written or removed later.
        """
        url = f"{self.url}/{name}".rstrip("/")
        fs = _connected(self.url)
        path = fs._strip_protocol(url)
        try:
            return patiently(lambda: work(fs, path), url, PATIENCE, attempt=attempt)
        except PermissionError as error:
            raise PermissionError(
                f"{url} is refused by the store ({error}): mend the keys or rights (list, read, write, delete)"
            ) from error


def _connected(url: str) -> Any:
    """The file system of a URL; ValueError when no package knows such a one."""
    scheme, _, rest = url.partition("://")
    keys = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    try:
        return _file_system(f"{scheme}://{rest.partition('/')[0]}", keys)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url} cannot be opened: {error}; name a folder, or s3://bucket/prefix") from error


@lru_cache(maxsize=4)
def _file_system(store: str, keys: tuple[tuple[str, str], ...]) -> Any:
    """One for a store and the environment that says who asks it."""
    return fsspec.url_to_fs(store, use_listings_cache=False, skip_instance_cache=True)[0]
