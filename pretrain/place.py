"""Is a place that somebody names a folder, or a URL that fsspec opens?"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

Place = Path | str  # a folder, or a URL


def is_url(place: Place) -> bool:
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def leads_out(name: str) -> bool:
    """Would a file of this name, which others gave, lie outside the folder that it is written to?"""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def place_of(text: str) -> Place:
    """What a command line or a record names; ValueError for a URL without a path, or with an empty part in it."""
    if not is_url(text):
        return Path(text)
    if not text.partition("://")[2].strip("/"):
        raise ValueError(f"{text} names no folder of that store: such as s3://bucket/set")
    if "//" in text.partition("://")[2].strip("/"):
        raise ValueError(f"{text} has two slashes in its path, of which stores know other files: write one")
    return text.rstrip("/")
