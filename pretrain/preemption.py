"""Has the machine asked for this process's place? By SIGTERM or SIGUSR1, which ask and do not end it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from pretrain.exits import Postponed, Preempted

ASKING = (signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """Between enter and exit, `received` is the name of the first signal that asked this process to stop, or ""."""

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._receive) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, (Preempted, Postponed)):
            return  # a launcher asks all ranks again as soon as the first has gone
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
