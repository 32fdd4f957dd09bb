"""Which files does a folder or a tar hold? Found without extracting or opening anything by a name read from data."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
WHOLE_FILE = -1  # as num_bytes: up to the end of the file


@dataclass(frozen=True)
class FileRef:
    """Where the bytes of one file lie: a whole file, or a piece of a tar."""

    path: str
    offset: int  # bytes
    num_bytes: int

    def read(self) -> bytes:
        """The bytes; fewer when the tar ends too early. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.num_bytes == WHOLE_FILE else file.read(self.num_bytes)

    def size(self) -> int:
        """How many bytes it should have."""
        return os.path.getsize(self.path) if self.num_bytes == WHOLE_FILE else self.num_bytes


def is_image_name(name: str) -> bool:
    """Whether a name ends like an image's; what is inside decides later."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def files_of(path: Path) -> dict[str, FileRef]:
    """Every regular file below a folder, or in a tar, by its relative name with forward slashes, sorted by name."""
    listed = _files_of_tar(path) if path.is_file() else _files_of_folder(path)
    return dict(sorted(listed))


def _files_of_folder(folder: Path) -> Iterator[tuple[str, FileRef]]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(where) / name
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(folder).as_posix(), FileRef(str(path), 0, WHOLE_FILE)


def _files_of_tar(path: Path) -> Iterator[tuple[str, FileRef]]:
    """Members are only listed: links, devices and folders are passed over, and a name like ../../x is just a text."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    name = str(PurePosixPath(member.name))
                    yield name, FileRef(str(path), member.offset_data, member.size)
    except tarfile.ReadError as error:
        raise ValueError(
            f"{path} is no plain tar file ({error}): unpack a compressed one with gunzip, or copy a broken one again"
        ) from error
