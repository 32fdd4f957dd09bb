"""How is a file written so that nobody ever sees half of it, what names its content, and what else may a path be?
Standard library only, as `schema.py`."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

FILE = "a file"
KINDS: dict[str, Callable[[int], bool]] = {  # of what lies somewhere, by its mode
    FILE: stat.S_ISREG,
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` by a temporary name, flushed and renamed: no reader sees half of it.

    Of several that write the same at once the last wins, whole: each has a temporary name of its own. Where `path` is
    a symbolic link, it is written where the link leads, and the link stays.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the renames done in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Lower-case hexadecimal SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of(mode: int) -> str:
    """One of KINDS."""
    return next((kind for kind, holds in KINDS.items() if holds(mode)), "nothing known")


def no_file(path: Path) -> str:
    """What is said of a path in place of a file; nothing is opened, as a pipe would wait for who writes to it."""
    return f"{path} is {kind_of(path.stat().st_mode)}, not a file" if path.exists() else f"{path} is missing"
