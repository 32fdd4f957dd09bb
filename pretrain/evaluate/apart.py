"""Have the sets that teach and test images in common? By their files; no image is read."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path


def resolved(paths: Iterable[str | Path]) -> frozenset[str]:
    """The same files without links on the way, or in place of them; each folder is looked at once."""
    parts = [os.path.split(path) for path in paths]
    homes = {home: os.path.realpath(home) for home, _ in parts}
    links = {entry.path for home in homes.values() if os.path.isdir(home) for entry in _links_in(home)}
    found = (os.path.join(homes[home], name) for home, name in parts)
    return frozenset(os.path.realpath(path) if path in links else path for path in found)


def require_apart(common: Collection[str]) -> None:
    """ValueError unless two sets have no files in common."""
    if common:
        raise ValueError(
            f"the sets that teach and test have {len(common)} image files in common, such as {min(common)}: scores "
            "on images that have taught say nothing; name two sets"
        )


def _links_in(home: str) -> list[os.DirEntry[str]]:
    with os.scandir(home) as entries:
        return [entry for entry in entries if entry.is_symlink()]
