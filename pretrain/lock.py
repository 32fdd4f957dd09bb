"""Does another process write to this run's folder? A lock that ends with its holder, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


class Busy(ValueError):
    """Another process holds the folder."""


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Holds OUT for this process; Busy names the process that already does, ValueError tells of a place below a file.

    Two runs in one folder would delete each other's checkpoints. A file system without locks is warned of.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--out {out} lies below a file ({error.strerror}): name another folder") from error
    with (out / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Busy(
                f"{out} is being written by {file.read().strip() or 'another process'}: wait for it, end it, or "
                "name another --out"
            ) from None
        except OSError as error:
            warnings.warn(f"{out} cannot be locked ({error}): start no second run there", stacklevel=2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
