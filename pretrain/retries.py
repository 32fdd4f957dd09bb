"""How is a store or a file system that fails asked again? With growing pauses, for so many seconds."""

from __future__ import annotations

import errno
import os
import queue
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

from data_prep.stores import (
    CHANCE,
    NO_KEYS,
    OF_RIGHTS,
    SET_KEYS,
    causes,
    is_absent,
    is_misnamed,
    misnamed,
    status_of,
)

FIRST_PAUSE = 0.1  # seconds before an attempt is repeated; doubled each time
LONGEST_PAUSE = 30.0  # seconds
SILENT = 10.0  # seconds after which it is told that a store fails
OF_NAMES = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # a path stays what it is
BUSY = (408, 409, 425, 429)  # HTTP statuses of a store that may answer the same question later
NO_TLS = "WRONG_VERSION_NUMBER"  # of OpenSSL, where a server speaks plain HTTP
OUR_FAULTS = (TypeError, AttributeError, NameError)  # of this code: repeating does not mend them
LASTING = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
T = TypeVar("T")


class GaveUp(OSError):
    """A store has failed for as long as it may."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)

    def __reduce__(self) -> tuple[type[GaveUp], tuple[str]]:
        """A rank may send it to others."""
        return type(self), (self.strerror,)


def patiently(
    work: Callable[[], T],
    told: str,
    seconds: float,
    *,
    attempt: float | None = None,
    final: tuple[type[Exception], ...] = (),
    longest: float = LONGEST_PAUSE,
    stopped: threading.Event | None = None,
) -> T:
    """What `work` gives; while it fails it is done again, for `seconds`, then GaveUp; `told` names what is asked.

    FileNotFoundError, PermissionError, those of a path that can be no file, and the errors in `final` are raised at
    once; it is PermissionError too when there are no keys for a store or it refuses them, and ValueError for a name
    that no store takes.
    Pauses last at most `longest` seconds. A set `stopped` ends it after an attempt. One that takes longer than
    `attempt` seconds fails, and the next has twice as long: a store may take a question and never answer. What is
    left behind may still be done later: bound only what reads.
    """
    since: float | None = None  # the first failure
    is_told, pause = False, FIRST_PAUSE
    while True:
        asked = time.monotonic()
        try:
            if attempt is None:
                return work()
            left = seconds - (0.0 if since is None else asked - since)
            return within(min(attempt, max(left, pause)), work)
        except (PermissionError, *final, *OUR_FAULTS):
            raise
        except Exception as error:  # every store has errors of its own
            if is_absent(error) or getattr(error, "errno", None) in OF_NAMES:
                raise
            if status_of(error) in OF_RIGHTS:
                raise PermissionError(f"{error}: mend the keys, or their rights there") from error
            if type(error).__name__ in NO_KEYS:
                raise PermissionError(f"{error}: {SET_KEYS}") from error
            if is_misnamed(error):
                raise misnamed(told, error) from error
            if since is None:  # what took long before it failed has not failed so long
                since = time.monotonic() if attempt is None else asked
            failing, stopped = time.monotonic() - since, stopped or threading.Event()
            if stopped.is_set():
                raise GaveUp(f"{told} was given up, at last with {error!r}") from error
            if failing >= seconds:
                raise GaveUp(f"{told} has failed for {seconds:g} seconds, at last with {error!r}") from error
            if failing > SILENT and not is_told:
                is_told = True
                warnings.warn(
                    f"{told} fails since {failing:.0f} seconds: {error!r}; tried again for {seconds:g} in all",
                    stacklevel=2,
                )
            if attempt is not None and isinstance(error, TimeoutError):
                attempt *= 2
        # Of many processes not all at once; and no longer than it may fail, for one last attempt then.
        stopped.wait(min(CHANCE.uniform(pause / 2, pause), seconds - failing))
        pause = min(2 * pause, longest)


def is_passing(error: Exception) -> bool:
    """May what failed go well later? Not where something is missing, forbidden, or no file or folder of that kind."""
    is_of_name = getattr(error, "errno", None) in OF_NAMES
    return isinstance(error, OSError) and not isinstance(error, LASTING) and not is_of_name


def refusal(error: BaseException | None) -> str:
    """Why nobody takes connections at an address, as a store's error hides it deep inside; "" of other errors."""
    for one in causes(error):
        if isinstance(one, socket.gaierror) and one.errno != socket.EAI_AGAIN:
            return str(one.strerror)
        if isinstance(one, OSError) and one.errno == errno.ECONNREFUSED:
            return os.strerror(one.errno)
    return ""


def is_of_address(error: BaseException) -> bool:
    """Does what failed tell of a wrong address? Nobody knows its name, another kind of server is there, or the store
    takes no such question; not where nobody takes connections now, or the store has no time."""
    status = status_of(error)
    if status is not None:
        return 300 <= status < 500 and status not in BUSY
    return any(
        (isinstance(one, socket.gaierror) and one.errno != socket.EAI_AGAIN)
        or isinstance(one, ssl.SSLCertVerificationError)
        or getattr(one, "reason", None) == NO_TLS
        for one in causes(error)
    )


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` gives; TimeoutError when it takes longer."""
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:  # raised where it was asked
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty as late:
        raise TimeoutError(f"no answer within {seconds:.3g} seconds") from late
    if error is not None:
        raise error
    return answer
