"""What does a start leave behind that was refused before it wrote anything of a run? Nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.lock import LOCK
from pretrain.watchdog import RANKS

LOOKS, SECONDS = 20, 0.05  # at the last signs of other ranks, which are refused at the same time; between two


@contextmanager
def leaving_nothing(out: Path, num_ranks: int, *, was_there: bool) -> Iterator[None]:
    """Within it, while the lock is held, a mistake of the user's leaves no lock and no signs, where nothing else is.

    `was_there` is OUT from before the lock. A rank that has not ended yet may still look for the signs of this one,
    to know that it ended by itself: they stay then.
    """
    try:
        yield
    except (ValueError, OSError):
        if {path.name for path in out.iterdir()} <= {LOCK, RANKS} and _have_ended(out / RANKS, num_ranks):
            shutil.rmtree(out / RANKS, ignore_errors=True)
            (out / LOCK).unlink(missing_ok=True)
            if not was_there:
                shutil.rmtree(out, ignore_errors=True)
        raise


def _have_ended(signs: Path, num_ranks: int) -> bool:
    for _ in range(LOOKS):
        try:
            ended = [json.loads(path.read_text())["ended"] for path in signs.glob("rank_*.json")]
        except (OSError, ValueError):  # one is being written
            ended = []
        if not signs.is_dir() or (len(ended) == num_ranks and all(ended)):
            return True
        time.sleep(SECONDS)
    return False
