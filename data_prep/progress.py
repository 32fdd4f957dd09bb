"""How far is a long run, and when does it end? One bar with an ETA, on a terminal and in a log file."""

from __future__ import annotations

import sys

from tqdm import tqdm

LOG_INTERVAL = 5.0  # seconds between two lines where the output is no terminal
_LOG_FORMAT = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} {rate_fmt} elapsed {elapsed} ETA {remaining}"


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
