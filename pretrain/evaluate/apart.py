"""Have the sets that teach and test images in common? By their files: linked, or copied byte by byte."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.collectives import rank

SECONDS = 20.0  # that looking for hard links and copies takes at most; a million files may take longer
MOST_COPIES = 0.01  # of the files that test: public sets show some photographs twice
END = 4096  # bytes at the end of a file, which tell two images of one size apart

Files = Mapping[str, str]  # what tells a file of images from others, its path or SHA-256 -> its place


def resolved(paths: Iterable[str | Path]) -> dict[str, str]:
    """The same files without links on the way, or in place of them; each folder is looked at once."""
    parts = [os.path.split(path) for path in paths]
    homes = {home: os.path.realpath(home) for home, _ in parts}
    links = {entry.path for home in homes.values() if os.path.isdir(home) for entry in _links_in(home)}
    found = (os.path.join(homes[home], name) for home, name in parts)
    return {path: path for path in (os.path.realpath(path) if path in links else path for path in found)}


def require_apart(teaching: Files, testing: Files) -> None:
    """ValueError unless two sets have no files in common, hard links included, and hardly any copies of one another.

    Hard links and copies of files that are known by their paths are looked for on the first rank, for SECONDS; what
    could not be looked at by then, and the few copies that are let pass, are told.
    """
    _require_none({testing[name] for name in teaching.keys() & testing.keys()}, "image files in common")
    if rank():
        return  # the first one tells all
    until = time.monotonic() + SECONDS
    tested, taught = (
        sorted(name for name, place in one.items() if name == place) for one in (testing, teaching)
    )
    linked, of_size, seen = _alike(taught, tested, until)
    _require_none(linked, "image files in common by hard links")
    copied, compared = _copies(of_size, until)
    if len(copied) > MOST_COPIES * len(tested):
        _require_none(copied, f"image files of equal bytes (of {len(tested)} that test)")
    if copied:
        print(
            f"warning: {len(copied)} of {len(tested)} images that test have taught too, byte by byte, such as "
            f"{min(copied)}",
            file=sys.stderr,
        )
    num_alike = sum(len(one.tested) for one in of_size)
    if seen < len(taught) or compared < num_alike:
        print(
            f"copies were looked for during {SECONDS:.0f} s, among {seen:,} of {len(taught):,} images that teach and "
            f"{compared:,} of {num_alike:,} that test and have a size of theirs; of others, paths alone are known"
        )


@dataclass
class _OfSize:
    """Files of one size, as all pictures of some pixels have that are not compressed."""

    tested: list[str] = field(default_factory=list)
    taught: list[str] = field(default_factory=list)


def _alike(taught: list[str], tested: list[str], until: float) -> tuple[set[str], list[_OfSize], int]:
    """Files that test and are hard links of others that teach; those of sizes that both have; and how many that teach
    were looked at.
    """
    inodes, sizes = {}, defaultdict(_OfSize)
    for path in tested:
        if found := _looked_at(path, until):
            inodes[found.st_dev, found.st_ino] = path
            sizes[found.st_size].tested.append(path)
    linked, seen = set(), 0
    for path in taught:
        if time.monotonic() > until:
            break
        seen += 1
        if found := _looked_at(path, until):
            if (found.st_dev, found.st_ino) in inodes:
                linked.add(inodes[found.st_dev, found.st_ino])
            if found.st_size in sizes:
                sizes[found.st_size].taught.append(path)
    return linked, [one for one in sizes.values() if one.taught], seen


def _looked_at(path: str, until: float) -> os.stat_result | None:
    """None past the time, and for a file that cannot be looked at: it is counted when it is read."""
    with suppress(OSError):
        return os.stat(path) if time.monotonic() <= until else None
    return None


def _copies(of_size: Iterable[_OfSize], until: float) -> tuple[set[str], int]:
    """Files that test and have the bytes of one that teaches, and how many of them were compared in time.

    Each file is read once, and beyond its end only where another of its size has the same.
    """
    copied, compared = set(), 0
    for one in of_size:
        ends = _by(_end_of, one.taught, until)
        for end, tested in _by(_end_of, one.tested, until).items():
            contents = _by(_content_of, ends.get(end, []), until)
            for content, paths in _by(_content_of, tested if contents else [], until).items():
                copied |= set(paths) if content in contents else set()
        if time.monotonic() > until:
            break
        compared += len(one.tested)
    return copied, compared


def _by(told_by: Callable[[str], bytes], paths: Iterable[str], until: float) -> dict[bytes, list[str]]:
    """Files that can be read by what is told of them, those that are reached in time."""
    found = defaultdict(list)
    for path in paths:
        if time.monotonic() > until:
            break
        with suppress(OSError):
            found[told_by(path)].append(path)
    return found


def _end_of(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - END, 0))
        return hashlib.sha256(file.read()).digest()


def _content_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _require_none(common: set[str], what: str) -> None:
    if common:
        raise ValueError(
            f"the sets that teach and test have {len(common)} {what}, such as {min(common)}: scores on images that "
            "have taught say nothing; name two sets"
        )


def _links_in(home: str) -> list[os.DirEntry[str]]:
    with os.scandir(home) as entries:
        return [entry for entry in entries if entry.is_symlink()]
