"""Where does the time of a step go? Every moment between two looks belongs to one named part.

On a GPU the marks are events in its queue: a part lasts as long as the device works on it, or idles in it. The host
may run ahead, and a wait for data that hides behind computation costs nothing. Marks are compared only when somebody
looks; until then nothing waits for the device. On a CPU they are readings of the system's clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

# Of a training step, in its order. `teacher`: the targets that it or a guide makes, and its average. `other`: what no
# part claims, such as the loss balance.
PARTS = ("data_wait", "forward", "teacher", "backward", "optimizer", "save", "evaluate", "log", "other")


Mark = Any  # seconds of the system's clock, or an event in the device's queue


class Clock:
    """Divides the time since the last `look` among PARTS; an inner part's time is not its outer part's."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._open = ["other"]
        self._laps: list[tuple[str, Mark]] = []  # part, and the mark where it ends
        self._begin = self._mark()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Counts the time inside as that of a part."""
        self._lap()
        self._open.append(part)
        try:
            with record_function(part):  # a range in a profiler's trace
                yield
        finally:
            self._lap()
            self._open.pop()

    def look(self) -> dict[str, float]:
        """Seconds of every part since the last look, and nothing left out: they add up to the time that passed.

        Waits for the device.
        """
        self._lap()
        seconds = dict.fromkeys(PARTS, 0.0)
        before = self._begin
        for part, mark in self._laps:
            seconds[part] += _between(before, mark)
            before = mark
        self._begin, self._laps = before, []
        return seconds

    def _lap(self) -> None:
        self._laps.append((self._open[-1], self._mark()))

    def _mark(self) -> Mark:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
