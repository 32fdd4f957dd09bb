"""How far is a long run, and when does it end? One bar with an ETA, on a terminal and in a log file."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

LOG_INTERVAL = 5.0  # seconds between two lines where the output is no terminal
_LOG_FORMAT = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} {rate_fmt} elapsed {elapsed} ETA {remaining}"


class _Lines:
    """A stream that ends every state of the bar with a newline, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(total: int, what: str, unit: str = "image", done: int = 0) -> tqdm:
    """A bar on standard error over `total` units of which `done` were done before; close it, or use it in `with`."""
    common = {"total": total, "desc": what, "unit": f" {unit}", "initial": done}
    if sys.stderr.isatty():
        return tqdm(**common, smoothing=0.1, dynamic_ncols=True)
    lines = _Lines(sys.stderr)
    return tqdm(**common, file=lines, mininterval=LOG_INTERVAL, bar_format=_LOG_FORMAT, ascii=True)
