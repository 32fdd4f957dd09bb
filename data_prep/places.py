"""Where can a data set lie? In a folder on disk, or behind any URL that fsspec opens; read and written alike.

A name in a place holds a whole file or none: on disk by a temporary name, fsync and rename; on S3 and its like
because an object appears when its upload is complete. No streaming write handle is ever used: one that is left after
an error commits what it has. What was put is verified by its size and by the hash that the store tells, or by reading
it again.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.files import fsync_folder, write_atomic
from data_prep.stores import PART, Content, NotVerified, Pieces, connected, patiently

READ_AHEAD = 4 * 2**20  # bytes, of one request of a reader
TEMPORARY = ".tmp"  # ending of files that are not finished
SWEPT = 10  # attempts at a file in a folder that another builder may sweep at any moment
# Protocols whose objects appear whole; elsewhere a temporary name comes first.
WHOLE_OBJECTS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
S3 = ("s3", "s3a")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NEARLY_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/?[^/]")


def place_of(text: str | Path | Place) -> Place:
    """The place that a command line or a record names; ValueError for a URL without a path, or of no known kind."""
    text = str(text)
    if text.startswith("file://"):
        text = text.removeprefix("file://") or "/"
    if not is_url(text):
        if _NEARLY_URL.match(text) and not Path(text).exists():
            kind, _, path = text.partition(":")
            raise ValueError(
                f"{text} is no URL, which has two slashes, and no folder that is there: write {kind}://{path.strip('/')}"
                f", or ./{text} for a folder of that name"
            )
        return Place(str(Path(text)))
    if not text.partition("://")[2].strip("/"):
        raise ValueError(f"{text} names no folder of that store: write it as s3://bucket/folder")
    place = Place(text.rstrip("/"))
    connected(place.url)  # a kind of URL that no package knows is refused now
    return place


def is_url(text: str) -> bool:
    """Whether a text names something behind a URL, and not on disk."""
    return _URL.match(text) is not None


@dataclass(frozen=True)
class Entry:
    """A file as a listing tells of it."""

    size: int  # bytes
    state: (
        str  # changes when the file is written again: its ETag, on disk its time; "" where neither is known
    )


@dataclass(frozen=True)
class Place:
    """A folder on disk or behind a URL; names are of files right inside, or relative with forward slashes.

    While a store fails, a call is repeated with growing pauses for `stores.PATIENCE` seconds; then OSError with the
    URL, the rule and the remedy. FileNotFoundError says that a store answers and has no such file.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def local(self) -> Path | None:
        """The folder on disk; None behind a URL."""
        return None if is_url(self.url) else Path(self.url)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return PurePosixPath(self.url).name

    def child(self, name: str) -> Place:
        """The place of a folder inside."""
        return Place(self._url_of(name) if self.local is None else str(self.local / name))

    def exists(self, name: str) -> bool:
        """Whether a file of this name is there."""
        if self.local is not None:
            return (self.local / name).is_file()
        try:
            self._info(name)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError without it."""
        if self.local is not None:
            return (self.local / name).stat().st_size
        size = self._info(name)["size"]
        return len(self.read(name)) if size is None else int(size)

    def entry(self, name: str) -> Entry:
        """Size and state of one file; FileNotFoundError without it."""
        if self.local is not None:
            stat = (self.local / name).stat()
            return Entry(stat.st_size, str(stat.st_mtime_ns))
        return _entry(self._info(name))

    def read(self, name: str) -> bytes:
        """The content of a file; FileNotFoundError without it."""
        if self.local is not None:
            return (self.local / name).read_bytes()
        return patiently(self._url_of(name), lambda fs, path: fs.cat_file(path))

    def open(self, name: str) -> io.BufferedReader:
        """A reader of a file that can seek; behind a URL it asks for pieces, each repeated when it fails."""
        if self.local is not None:
            return open(self.local / name, "rb")
        return io.BufferedReader(Pieces(self._url_of(name), self.size(name)), READ_AHEAD)

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names of the files right inside that match the shell pattern; none without such a folder."""
        return sorted(
            name for name, is_file in self._entries() if is_file and fnmatch.fnmatchcase(name, pattern)
        )

    def folders(self) -> list[str]:
        """Sorted names of the folders right inside; none without such a folder."""
        return sorted({name for name, is_file in self._entries() if not is_file})

    def listed(self) -> dict[str, Entry]:
        """Size and state of the files right inside, by name, in one question; none without such a folder."""
        if self.local is not None:
            there = list(os.scandir(self.local)) if self.local.exists() else []
            stats = {entry.name: entry.stat() for entry in there if entry.is_file()}
            return {name: Entry(stat.st_size, str(stat.st_mtime_ns)) for name, stat in stats.items()}

        def ask(fs: Any, path: str) -> dict[str, Entry]:
            found = fs.ls(path, detail=True)
            return {one["name"].rpartition("/")[2]: _entry(one) for one in found if one["type"] == "file"}

        try:
            return patiently(self.url, ask)
        except FileNotFoundError:
            return {}

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, replacing one of that name; verified."""
        if self.local is not None:
            path = self.local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
            return
        self._send(name, lambda fs, path: fs.pipe_file(path, content), Content.of_bytes(content))

    def put(self, name: str, path: Path) -> None:
        """Copy a finished local file here under `name`, whole or not at all; verified. The file itself stays."""
        if self.local is not None:
            self._copy(name, path)
            return
        options = {"chunksize": PART, "max_concurrency": 2} if self._scheme in S3 else {}
        self._send(name, lambda fs, there: fs.put_file(str(path), there, **options), Content.of_file(path))

    def move(self, name: str, path: Path) -> None:
        """As `put`, and the local file is gone afterwards; on one disk it is renamed and nothing is copied."""
        if self.local is not None:
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(path, target)
                fsync_folder(target.parent)
                return
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        self.put(name, path)
        path.unlink()

    def create(self, name: str, content: bytes) -> bool:
        """Write a file only if there is none of that name; False when there is.

        Of several at once one alone gets True, on disk and on stores that obey `If-None-Match` (AWS S3; rclone does
        not): elsewhere write something of your own and read it again after a while.
        """
        if self.local is not None:
            for _ in range(SWEPT):
                with contextlib.suppress(FileNotFoundError):
                    return _create_on_disk(self.local / name, content)
            return _create_on_disk(self.local / name, content)
        if self.exists(name):
            return False
        options = {"mode": "create"} if self._scheme in S3 else {}
        with contextlib.suppress(FileExistsError):  # also after an attempt of ours whose answer was lost
            patiently(self._url_of(name), lambda fs, path: fs.pipe_file(path, content, **options))
        return self.read(name) == content

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens when it is missing."""
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            patiently(self._url_of(name), lambda fs, path: fs.rm_file(path))

    def remove_folder(self, name: str) -> None:
        """Remove a folder and all in it; nothing happens when it is missing."""
        if self.local is not None:
            shutil.rmtree(self.local / name, ignore_errors=True)
            return
        with contextlib.suppress(FileNotFoundError):
            patiently(self._url_of(name), lambda fs, path: fs.rm(path, recursive=True))

    @property
    def _scheme(self) -> str:
        return self.url.partition("://")[0]

    def _url_of(self, name: str) -> str:
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} leads out of {self.url}: use a name inside")
        return f"{self.url}/{name}"

    def _info(self, name: str) -> dict[str, Any]:
        info = patiently(self._url_of(name), lambda fs, path: fs.info(path))
        if info.get("type", "file") != "file":
            raise FileNotFoundError(f"{self._url_of(name)} is a folder")
        return info

    def _entries(self) -> list[tuple[str, bool]]:
        """Names right inside, each with whether it is a file."""
        if self.local is not None:
            there = self.local.iterdir() if self.local.exists() else ()
            return [(entry.name, entry.is_file()) for entry in there]

        def listed(fs: Any, path: str) -> list[tuple[str, bool]]:
            found = [(one["name"].rstrip("/"), one["type"] == "file") for one in fs.ls(path, detail=True)]
            own = fs._strip_protocol(path).rstrip("/")  # some stores list the folder itself
            return [
                (name.rpartition("/")[2], is_file)
                for name, is_file in found
                if name.strip("/") != own.strip("/")
            ]

        try:
            return patiently(self.url, listed)
        except FileNotFoundError:
            return []

    def _copy(self, name: str, path: Path) -> None:
        """A local file into this folder on disk."""
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}{TEMPORARY}")
        try:
            with open(path, "rb") as source, open(temporary, "wb") as copy:
                shutil.copyfileobj(source, copy, READ_AHEAD)
                copy.flush()
                os.fsync(copy.fileno())
            if temporary.stat().st_size != path.stat().st_size:
                raise NotVerified(f"{target}: {path} changed while it was copied; copy it again")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(target.parent)

    def _send(self, name: str, send: Callable[[Any, str], object], content: Content) -> None:
        """Upload by `send` and verify, again and again until both are well."""
        url, is_whole = self._url_of(name), self._scheme in WHOLE_OBJECTS

        def attempt(fs: Any, path: str) -> None:
            there = path if is_whole else path + TEMPORARY
            if not is_whole:
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            send(fs, there)
            content.require(fs, there, url)
            if not is_whole:
                fs.mv(there, path)

        try:
            patiently(url, attempt)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{url} cannot be written ({error}): a bucket must exist before a build, make it or name another"
            ) from error


def _entry(info: dict[str, Any]) -> Entry:
    return Entry(info["size"], str(info.get("ETag", "")).strip('"'))


def _create_on_disk(path: Path, content: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    try:
        write_atomic(temporary, content)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True
