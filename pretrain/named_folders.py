"""Which folders does a command line name? NAME=DIR, or NAME=URL where that is allowed, by name; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain.command import no_folder
from pretrain.place import Place, is_url, place_of


def named_places(option: str, pairs: Sequence[str]) -> dict[str, Place]:
    """Folders, or URLs of folders, by name, as they are given, in that order; `option` is what the errors call the
    pairs.

    ValueError for another form or a name given twice, FileNotFoundError for what is no folder.
    """
    places: dict[str, Place] = {}
    for pair in pairs:
        name, _, place = pair.partition("=")
        if not (name and place):
            raise ValueError(f"{option} {pair!r} must look like NAME=DIR, such as scenes=data/scenes/train")
        if name in places:
            raise ValueError(f"{option} names {name!r} twice: give every folder a name of its own")
        if not is_url(place) and not Path(place).is_dir():
            raise FileNotFoundError(f"{option} {pair}: {no_folder(Path(place))}; name one that exists")
        places[name] = place_of(place)
    return places


def named_folders(option: str, pairs: Sequence[str]) -> dict[str, Path]:
    """As `named_places`, of this machine alone: ValueError for a URL."""
    folders: dict[str, Path] = {}
    for name, place in named_places(option, pairs).items():
        if not isinstance(place, Path):
            raise ValueError(f"{option} {name}={place} is a URL: copy the data set to a folder for this")
        folders[name] = place
    return folders
