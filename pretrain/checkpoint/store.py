"""What must a place do that holds checkpoints, and is what it holds as it was written?"""

from __future__ import annotations

import errno
import hashlib
import re
from typing import Protocol, runtime_checkable

from pretrain import intact

PIECE = 2**24  # bytes, written or read at once
STEP_NAME = re.compile(r"step_(\d{6,})")  # of the folder of a checkpoint
Content = bytes | bytearray


@runtime_checkable
class Store(Protocol):
    """A folder of checkpoints, or that of one; names are relative, with forward slashes."""

    def child(self, name: str) -> Store:
        """The folder of this name inside."""

    def folders(self) -> list[str]:
        """Names of the folders right inside; none where there is nothing."""

    def sizes(self) -> dict[str, int]:
        """Bytes of all files by name, at any depth; none where there is nothing."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytearray:
        """Bytes of a file from `start` to before `end`; FileNotFoundError without it."""

    def write(self, name: str, content: Content) -> None:
        """Writes a file whole, so that it stays after a power cut."""

    def room(self) -> int | None:
        """Bytes that are free; None where there is no such limit."""

    def begin(self, name: str, attempt: str) -> None:
        """Makes way for a checkpoint of this name; where nothing can be renamed, an older one is gone from now on."""

    def unfinished(self, name: str, attempt: str) -> Store:
        """Where the files of a checkpoint are written before it is published."""

    def publish(self, name: str, attempt: str, digests: intact.Digests) -> None:
        """Makes what was written appear under its name, in one step."""

    def give_up(self, name: str, attempt: str) -> None:
        """Removes what an attempt has written that is not to be published."""

    def remove(self, name: str) -> None:
        """Removes a folder; a reader never sees a part of it as whole."""

    def recover(self) -> None:
        """Gives its name back to what a process that is gone was about to replace; nothing is removed."""

    def tidy(self) -> None:
        """Removes what processes left unfinished that are gone."""

    def problem(self, *, hashes: bool, of: str = "") -> str | None:
        """What is wrong with the checkpoint in this folder, as `intact.compare`; of names that begin with `of`."""


def problem_of(store: Store, hashes: bool, of: str) -> str | None:
    try:
        mark = bytes(store.read(intact.COMPLETE))
    except FileNotFoundError:
        mark = None
    sizes = store.sizes()

    def hashed(name: str) -> str:
        return sha256(store, name, sizes[name])

    return intact.compare(mark, sizes, hashed if hashes else None, of)


def sha256(store: Store, name: str, num_bytes: int) -> str:
    """Of the first bytes of a file, read now, in lower-case hexadecimal."""
    hashed = hashlib.sha256()
    for start in range(0, num_bytes, PIECE):
        hashed.update(store.read(name, start, min(start + PIECE, num_bytes)))
    return hashed.hexdigest()


def put(store: Store, name: str, content: Content) -> dict[str, int | str]:
    """Writes a file, reads it again, and gives its entry for COMPLETE; OSError when it reads otherwise."""
    written = hashlib.sha256(content).hexdigest()
    store.write(name, content)
    if sha256(store, name, len(content)) != written:
        raise OSError(errno.EIO, f"{store}/{name} reads back with other bytes than were written")
    return {"bytes": len(content), "sha256": written}
