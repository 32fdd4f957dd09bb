"""How does a command of this package end?"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.exits import FAILED, FINISHED, INTERRUPTED


def exit_code(
    work: Callable[[list[str] | None], object],
    arguments: Sequence[str] | None = None,
    interrupted: str = "nothing was written",
) -> int:
    """0 when `work` is done; a mistake of the user's (ValueError, OSError) is told in one message.

    `interrupted` says what is left when the user ends it (Ctrl-C).
    """
    try:
        work(None if arguments is None else list(arguments))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"\ninterrupted: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    return FINISHED


def require_place(option: str, path: Path) -> None:
    """ValueError unless something can be written at `path`: hours of work are not begun for a place that is none.

    What is there and no file, such as a device, is refused too: it would be replaced.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{option} {path} is a device, pipe or socket, and would be replaced: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {path} cannot be written ({error.strerror}): name another place"
        ) from error
