"""How is a folder of files whole or not there at all? Digests of every file, flushed, written last.

A reader trusts a folder only with its COMPLETE file, {"files": {relative path: {"bytes", "sha256"}}}.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from data_prep.files import sha256_file as sha256
from data_prep.files import write_atomic

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
    write_text(folder / COMPLETE, mark_text(digests))


def mark_text(digests: Digests) -> str:
    """The content of a COMPLETE file."""
    return json.dumps({"files": digests}, indent=1)


def publish(partial: Path, folder: Path, digests: Digests) -> None:
    """Marks `partial` as complete and gives it its name in one step that survives a power cut.

    What had that name is gone.
    """
    mark(partial, digests)
    for inner in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        flush(inner)
    replaced = folder.with_name(f"{partial.name}.replaced")
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(partial, folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def verify(folder: Path, *, hashes: bool) -> str | None:
    """What is wrong with a folder, None when it is whole; with `hashes` every byte is read, else only sizes."""
    try:
        content = (folder / COMPLETE).read_bytes()
    except FileNotFoundError:
        content = None
    sizes = {name: (folder / name).stat().st_size for name in files_in(folder)}
    return compare(content, sizes, (lambda name: sha256(folder / name)) if hashes else None)


def compare(
    mark: bytes | None, sizes: Mapping[str, int], sha256: Callable[[str], str] | None, of: str = ""
) -> str | None:
    """The first way in which the files that are there differ from the content of their COMPLETE; None where none.

    Of files whose names begin with `of`; `sha256` computes that of a file, None compares only sizes.
    """
    if mark is None:
        return f"{COMPLETE} is missing"
    try:
        files = json.loads(mark)["files"]
    except (ValueError, KeyError):
        return f"{COMPLETE} is damaged"
    for name in (name for name in files if name.startswith(of)):
        expected = files[name]
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != expected["bytes"]:
            return f"{name} has {sizes[name]} bytes instead of {expected['bytes']}"
        if sha256 is not None and sha256(name) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def identity(folder: Path, of: str = "") -> str:
    """SHA-256 of what its COMPLETE says that the files of a folder are whose names begin with `of`: equal for equal
    ones, wherever they lie.
    """
    files = json.loads((folder / COMPLETE).read_text())["files"]
    told = [(name, entry["sha256"]) for name, entry in sorted(files.items()) if name.startswith(of)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def followed(path: Path) -> Path:
    """Where a symbolic link leads, which is written in its place; of anything else the path itself.

    OSError for one that leads back to itself.
    """
    try:
        return path.resolve() if path.is_symlink() else path
    except RuntimeError as error:
        raise OSError(
            f"{path} is a link that leads back to itself: delete it, or name another place"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also over an older one, so that it stays after a power cut."""
    write_atomic(path, text.encode())


def flush(path: Path) -> None:
    """Waits until the disk holds a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
