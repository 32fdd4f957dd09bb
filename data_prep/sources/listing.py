"""Which files does a folder or a tar hold? Found without extracting or opening anything by a name read from data."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.sources.tar_index import BadTar, members_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
WHOLE_FILE = -1  # as num_bytes: up to the end of the file


@dataclass(frozen=True)
class FileRef:
    """Where the bytes of one file lie: a whole file, or a piece of a tar."""

    path: str
    offset: int  # bytes
    num_bytes: int

    def read(self, at_most: int | None = None) -> bytes:
        """The bytes, or the first `at_most` of them; fewer when the tar ends too early. Raises OSError.

        A header may claim more than there is: no more memory is taken than the file has bytes.
        """
        with open(self.path, "rb") as file:
            num_bytes = max(0, file.seek(0, os.SEEK_END) - self.offset)
            for limit in (at_most, None if self.num_bytes == WHOLE_FILE else self.num_bytes):
                num_bytes = num_bytes if limit is None else min(num_bytes, limit)
            file.seek(min(self.offset, 2**62))
            return file.read(num_bytes)

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


def files_of(path: Path) -> dict[str, FileRef]:
    """Every regular file below a folder, or in a tar, by its relative name with forward slashes, sorted by name."""
    listed = _files_of_tar(path) if path.is_file() else _files_of_folder(path)
    return dict(sorted(listed, key=lambda one: one[0]))  # of one name twice in a tar the last counts


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


def _files_of_tar(path: Path) -> Iterator[tuple[str, FileRef]]:
    """Members are only listed: links, devices and folders are passed over, and a name like ../../x is just a text."""
    try:
        with open(path, "rb") as file:
            for member in members_of(file):
                name = str(PurePosixPath(member.name))
                yield name, FileRef(str(path), member.offset, member.num_bytes)
    except BadTar as error:
        raise ValueError(
            f"{path}: {error}; a plain tar file is needed: unpack a compressed one with gunzip, or copy a broken one"
            " again"
        ) from error
