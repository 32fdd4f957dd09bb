"""Does another process write to this run's folder, or where it keeps its checkpoints?

On disk a lock, which ends with its holder, however that ends; behind a URL a claim with a heartbeat.
"""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_prep.claim import Require, claimed, unclaimed
from data_prep.places import place_of
from pretrain.host import host_name
from pretrain.place import Place

LOCK = ".lock"
# Of a disk behind a network, or one that fails; another folder would not be the run's.
AWAY = (
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
)


class Busy(ValueError):
    """Another process holds the folder."""


@contextmanager
def only_writer(out: Path, option: str = "--out") -> Iterator[None]:
    """Holds OUT for this process; Busy names the process that already does, ValueError tells of a place below a file.
    OSError of a disk that is away.

    Two runs in one folder would delete each other's checkpoints. A file system without locks is warned of.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        opened = (out / LOCK).open("a+")
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{option} {out} lies below a file ({error.strerror}): name another folder"
        ) from error
    except OSError as error:
        if error.errno in AWAY:
            raise
        raise ValueError(
            f"{option} {out} cannot be made or written ({error.strerror}): name another folder"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Busy(
                f"{out} is being written by {file.read().strip() or 'another process'}: wait for it, end it, or "
                f"name another {option}"
            ) from None
        except OSError as error:
            warnings.warn(f"{out} cannot be locked ({error}): start no second run there", stacklevel=2)
        if not (out / LOCK).exists() or not os.path.samestat(os.fstat(file.fileno()), (out / LOCK).stat()):
            raise Busy(f"{out} was removed in this moment by a start that was refused: start again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {host_name()}\n")
        file.flush()
        yield


@contextmanager
def only_saver(place: Place) -> Iterator[Require]:
    """Holds the place of `--checkpoints`, as `only_writer` does; what it gives raises OSError once that is lost.

    Runs of two folders that keep their checkpoints in one place would take each other's for their own, and delete
    them. Behind a URL the claim of a process that is gone is waited for: 90 seconds, or none on its own machine.
    """
    if isinstance(place, Path):
        with only_writer(place, "--checkpoints"):
            yield unclaimed
        return
    with ExitStack() as held:
        try:
            require = held.enter_context(claimed(place_of(place)))
        except FileExistsError as error:
            raise Busy(f"{error}, end it, or name another --checkpoints") from error
        yield require
