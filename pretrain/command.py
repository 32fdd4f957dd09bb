"""How does a command of this package end?"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from data_prep.files import kind_of
from pretrain.exits import FAILED, FINISHED, INTERRUPTED
from pretrain.intact import followed


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


def exit_code_of_words(
    check: Callable[[list[str] | None], object],
    arguments: Sequence[str] | None = None,
    interrupted: str = "nothing was written",
) -> int:
    """`exit_code` of a look at the words of a command line, before what takes seconds to import.

    Of the ranks that a launcher started with the same words the first alone prints.
    """
    if os.environ.get("RANK", "0") == "0":
        return exit_code(check, arguments, interrupted)
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        return exit_code(check, arguments, interrupted)


def no_folder(path: Path) -> str:
    """What is said of a path in place of a folder, with what it is; nothing is opened, as a pipe would wait."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return f"{path} is no folder" + ", but a link that leads nowhere" * path.is_symlink()
    return f"{path} is no folder, but {kind_of(mode)}"


def require_place(option: str, path: Path) -> None:
    """ValueError unless something can be written at `path`: hours of work are not begun for a place that is none.

    What is there and no file, such as a device, is refused too: it would be replaced. Of a link, where it leads.
    """
    path = followed(path)
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
