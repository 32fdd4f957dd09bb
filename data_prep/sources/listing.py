"""Which files does a folder or a tar hold? Found without extracting or opening anything by a name read from data."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.places import Place, is_url
from data_prep.rows.inputs import split_path
from data_prep.sources.tar_index import BadTar, members_of
from data_prep.stores import patiently

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
WHOLE_FILE = -1  # as num_bytes: up to the end of the file


@dataclass(frozen=True)
class FileRef:
    """Where the bytes of one file lie: a whole file, or a piece of a tar, on disk or behind a URL."""

    path: str
    offset: int  # bytes
    num_bytes: int  # WHOLE_FILE on disk only

    def read(self, at_most: int | None = None) -> bytes:
        """The bytes, or the first `at_most` of them; fewer when the tar ends too early. Raises OSError.

        A header may claim more than there is: no more memory is taken than the file has bytes.
        """
        if is_url(self.path):
            num_bytes = self.num_bytes if at_most is None else min(at_most, self.num_bytes)
            return patiently(self.path, lambda fs, path: self._ask(fs, path, num_bytes))
        with open(self.path, "rb") as file:
            num_bytes = max(0, file.seek(0, os.SEEK_END) - self.offset)
            for limit in (at_most, None if self.num_bytes == WHOLE_FILE else self.num_bytes):
                num_bytes = num_bytes if limit is None else min(num_bytes, limit)
            file.seek(min(self.offset, 2**62))
            return file.read(num_bytes)

    def _ask(self, fs: Any, path: str, num_bytes: int) -> bytes:
        if num_bytes == 0:
            return b""
        try:
            return fs.cat_file(path, start=self.offset, end=self.offset + num_bytes)
        except OSError:  # some stores refuse what lies behind the end
            if fs.info(path)["size"] > self.offset:
                raise
            return b""

    def size(self) -> int:
        """How many bytes it should have."""
        return os.path.getsize(self.path) if self.num_bytes == WHOLE_FILE else self.num_bytes

    def has_vanished(self) -> bool:
        """Whether a whole file is gone from a folder that is still there and holds others.

        A folder that is missing or empty is rather a disk that is gone, as is a tar that was there before.
        """
        folder = os.path.dirname(self.path) or "."
        try:
            return (
                self.num_bytes == WHOLE_FILE and not os.path.lexists(self.path) and bool(os.listdir(folder))
            )
        except OSError:
            return False


def unreadable(name: str, error: OSError) -> OSError:
    """What to raise when the disk or the store fails while `name` is read: nothing is known of the image itself.

    Left out of a finished shard it would be lost for good, so that the build stops, to go on later.
    """
    told = (
        f"{name} cannot be read ({error}): inputs are left out for what they hold, not for a disk or store that "
        "fails: run the same command again, it goes on after the last finished shard; should this file alone "
        "fail again, copy it again"
    )
    return OSError(error.errno or errno.EIO, told)


def is_image_name(name: str) -> bool:
    """Whether a name ends like an image's; what is inside decides later."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def files_of(place: Place) -> dict[str, FileRef]:
    """Every regular file below a folder, or in a tar, by its relative name with forward slashes, sorted by name."""
    if is_file(place):
        listed = _files_of_tar(place)
    else:
        listed = _files_of_store(place) if place.local is None else _files_of_folder(place.local)
    return dict(sorted(listed, key=lambda one: one[0]))  # of one name twice in a tar the last counts


def is_file(place: Place) -> bool:
    """Whether a place is no folder but one file, such as a tar."""
    folder, name = split_path(str(place))
    return folder.exists(name)


def _files_of_folder(folder: Path) -> Iterator[tuple[str, FileRef]]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(where).relative_to(folder).as_posix()
        start = "" if inside == "." else f"{inside}/"
        for name in names:
            path = os.path.join(where, name)
            if not name.startswith(".") and _is_file(path):
                yield start + name, FileRef(path, 0, WHOLE_FILE)


def _is_file(path: str) -> bool:
    """As Path.is_file, which raises where looking is forbidden; asked only where the fast way says no."""
    return os.path.isfile(path) or Path(path).is_file()


def _files_of_store(folder: Place, below: str = "") -> Iterator[tuple[str, FileRef]]:
    for name, entry in folder.listed().items():
        if name and not name.startswith("."):
            size = folder.size(name) if entry.size is None else entry.size
            yield below + name, FileRef(f"{folder}/{name}", 0, size)
    for name in folder.folders():
        if name and not name.startswith("."):
            yield from _files_of_store(folder.child(name), f"{below}{name}/")


def _files_of_tar(place: Place) -> Iterator[tuple[str, FileRef]]:
    """Members are only listed: links, devices and folders are passed over, and a name like ../../x is just a text."""
    folder, name = split_path(str(place))
    try:
        with folder.open(name) as file:
            for member in members_of(file):
                inside = str(PurePosixPath(member.name))
                yield inside, FileRef(str(place), member.offset, member.num_bytes)
    except BadTar as error:
        raise ValueError(f"{place}: {error}; pass a plain tar, or copy a broken one again") from error
