"""How is a folder of files whole or not there at all? Digests of every file, flushed, written last.

A reader trusts a folder only with its COMPLETE file, {"files": {relative path: {"bytes", "sha256"}}}.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

COMPLETE = "COMPLETE"

Digests = dict[str, dict[str, int | str]]


def files_in(folder: Path) -> list[str]:
    """Relative paths of all files in a folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def digest(folder: Path, names: Iterable[str]) -> Digests:
    """Size and SHA-256 of the named files, each flushed to the disk first."""
    digests: Digests = {}
    for name in names:
        path = folder / name
        flush(path)
        digests[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return digests


def mark(folder: Path, digests: Digests) -> None:
    """Writes the COMPLETE file by which `verify` knows a folder."""
    write_text(folder / COMPLETE, json.dumps({"files": digests}, indent=1))


def publish(partial: Path, folder: Path, digests: Digests) -> None:
    """Marks `partial` as complete and gives it its name in one step that survives a power cut."""
    mark(partial, digests)
    for inner in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        flush(inner)
    os.rename(partial, folder)
    flush(folder.parent)


def verify(folder: Path, *, hashes: bool) -> str | None:
    """What is wrong with a folder, None when it is whole; with `hashes` every byte is read, else only sizes."""
    try:
        files = json.loads((folder / COMPLETE).read_text())["files"]
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except (ValueError, KeyError):
        return f"{COMPLETE} is damaged"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if hashes and sha256(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def write_text(path: Path, text: str) -> None:
    """Writes a file and flushes it to the disk."""
    path.write_text(text)
    flush(path)


def flush(path: Path) -> None:
    """Waits until the disk holds a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's bytes, in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
