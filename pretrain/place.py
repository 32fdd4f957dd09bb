"""Is a place that somebody names a folder, or a URL that fsspec opens?"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

OF_WEB = ("http://", "https://")
AS_URL = "write http://HOST/FOLDER or http://HOST:PORT/FOLDER"
Place = Path | str  # a folder, or a URL


def is_url(place: Place) -> bool:
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def leads_out(name: str) -> bool:
    """Would a file of this name, which others gave, lie outside the folder that it is written to?"""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def place_of(text: str) -> Place:
    """What a command line or a record names; ValueError for a URL without a path, with an empty part in it, or of the
    web at an address that can be none."""
    if not is_url(text):
        return Path(text)
    if not text.partition("://")[2].strip("/"):
        raise ValueError(f"{text} names no folder of that store: such as s3://bucket/set")
    if "//" in text.partition("://")[2].strip("/"):
        raise ValueError(f"{text} has two slashes in its path, of which stores know other files: write one")
    if text.lower().startswith(OF_WEB):
        _require_address(text)
    return text.rstrip("/")


def _require_address(url: str) -> None:
    """ValueError for a host or port that fsspec's client of the web would try again and again."""
    try:
        host, _ = urlsplit(url).hostname, urlsplit(url).port
    except ValueError as error:
        raise ValueError(f"{url} is no URL ({error}): {AS_URL}") from error
    if not host or "::" in host:  # by which fsspec chains file systems
        raise ValueError(f"{url} names no host that is asked by its name or IPv4 address: {AS_URL}")
