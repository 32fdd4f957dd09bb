"""Where does a source keep its lists, indices and downloads from one run to the next? In a folder on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import tyro

Scratch = Annotated[
    Path,
    tyro.conf.arg(
        help="folder on disk, no URL, for lists, indices and downloads; the same again goes on from it; when several"
        " machines work (--part, Ray, Spark), one that all of them share"
    ),
]
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # as pathlib spells it, with one slash


def require_on_disk(scratch: Path) -> None:
    """ValueError for a URL: databases and downloads need files that can be locked and read anywhere."""
    if _URL.match(str(scratch)):
        raise ValueError(
            f"scratch={str(scratch)!r} is a URL, databases and downloads need a folder on disk: pass --scratch"
            " scratch/NAME; --out and the inputs may be URLs"
        )
