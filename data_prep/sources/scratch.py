"""Where does a source keep its lists, indices and downloads from one run to the next? In a folder on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.output import FULL, NO_SPACE

Scratch = Annotated[
    Path,
    tyro.conf.arg(
        help="folder on disk, no URL, for lists, indices and downloads; the same again goes on from it; when several"
        " machines work (--part, Ray, Spark), one that all of them share"
    ),
]
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # as pathlib spells it, with one slash


@contextmanager
def on_disk(scratch: Path) -> Iterator[None]:
    """What is written in the block fits on the disk of `scratch`, or OSError says that this one is full.

    Raises ValueError for a URL: databases and downloads need files that can be locked and read anywhere.
    """
    if _URL.match(str(scratch)):
        raise ValueError(
            f"scratch={str(scratch)!r} is a URL, databases and downloads need a folder on disk: pass --scratch"
            " scratch/NAME; --out and the inputs may be URLs"
        )
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or str(error.strerror).startswith(NO_SPACE):
            raise
        raise OSError(
            error.errno,
            f"{NO_SPACE} {scratch}, where lists and indices are kept: free some space, or move that folder to a"
            " larger disk, and run the same command again",
        ) from error
