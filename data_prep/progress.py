"""How far is a long run, and when does it end? One bar with an ETA, on a terminal and in a log file."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

LOG_INTERVAL = 5.0  # seconds between two lines where the output is no terminal
_LOG_FORMAT = (
    "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} {rate_fmt} elapsed {elapsed} ETA {remaining}{postfix}"
)


class _Lines:
    """Standard error, with a newline after every state of the bar, for logs."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int, what: str, unit: str = "image", done: int = 0) -> tqdm:
    """A bar on standard error over `total` units of which `done` were done before; close it, or use it in `with`."""
    common = {"total": total, "desc": what, "unit": f" {unit}", "initial": done}
    if sys.stderr.isatty():
        return tqdm(**common, smoothing=0.1, dynamic_ncols=True)
    return tqdm(**common, file=_Lines(), mininterval=LOG_INTERVAL, bar_format=_LOG_FORMAT, ascii=True)


class ShardProgress:
    """Shards, images a second, what was left out by reason, and the time that is left, in one line."""

    def __init__(self, bar: tqdm, num_shards: int) -> None:
        self._bar, self._num_shards, self._num_done = bar, num_shards, 0
        self._dropped: Counter[str] = Counter()

    def advance(self, num_items: int) -> None:
        """So many more items were looked at; 0 lets a quiet log show that the run lives."""
        self._bar.update(num_items)

    def finish(self, dropped: Mapping[str, int]) -> None:
        """One more shard is finished; `dropped` counts what was left out of it, by reason."""
        self._num_done += 1
        self._dropped.update(dropped)
        left_out = ", ".join(f"{reason} {count}" for reason, count in sorted(self._dropped.items()))
        told = f"shards {self._num_done}/{self._num_shards}, left out: {left_out or 'nothing'}"
        self._bar.set_postfix_str(told, refresh=False)


@contextmanager
def shard_progress(num_items: int, what: str, num_shards: int, done: int) -> Iterator[ShardProgress]:
    """A progress over `num_items` items, of which `done` were done before, in `num_shards` shards."""
    with progress_bar(num_items, what, done=done) as bar:
        yield ShardProgress(bar, num_shards)
