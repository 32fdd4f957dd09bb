"""Which folders does a command line name? NAME=DIR as folders by name; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def named_folders(option: str, pairs: Sequence[str]) -> dict[str, Path]:
    """Folders by name, as they are given, in that order; `option` is what the errors call the pairs.

    ValueError for another form or a name given twice, FileNotFoundError for what is no folder.
    """
    folders: dict[str, Path] = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if not (name and folder):
            raise ValueError(f"{option} {pair!r} must look like NAME=DIR, such as scenes=data/scenes/train")
        if name in folders:
            raise ValueError(f"{option} names {name!r} twice: give every folder a name of its own")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{option} {pair}: {folder} is no folder; name one that exists")
        folders[name] = Path(folder)
    return folders
