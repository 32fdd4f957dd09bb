"""How does a command of this package end?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

MISTAKE = 1  # exit code for what the user can mend


def exit_code(work: Callable[[list[str] | None], object], arguments: Sequence[str] | None = None) -> int:
    """0 when `work` is done; a mistake of the user's (ValueError, OSError) is told in one message."""
    try:
        work(None if arguments is None else list(arguments))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0
