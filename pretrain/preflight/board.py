"""Where do ranks tell each other what they find, also when no collective call works? In rank 0's TCPStore."""

from __future__ import annotations

import json
import time
from typing import Any

import torch.distributed as dist

from pretrain.preflight.ranks import Ranks

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05  # seconds between two looks
PATIENCE = 1.5  # times what one check may take that nobody gets on, before one stops waiting
LONGEST_PART = 10.0  # seconds in which all must have heard the end
PREFIX = "preflight"


class Silent(TimeoutError):
    """What one waits for did not come, and nobody gets on."""


class Board:
    """JSON values by name, that all ranks see; `seconds` is the time that one check may take."""

    def __init__(self, store: dist.Store, ranks: Ranks, seconds: float) -> None:
        self._store, self.ranks, self._seconds = store, ranks, seconds

    def tell(self, name: str, value: Any) -> None:
        self._store.set(f"{PREFIX}/{name}", json.dumps(value, default=str))

    def has(self, name: str) -> bool:
        return self._store.check([f"{PREFIX}/{name}"])

    def count(self, name: str) -> int:
        """How many ranks have called this with that name."""
        return self._store.add(f"{PREFIX}/{name}", 1)

    def number(self, name: str) -> int:
        return self._store.add(f"{PREFIX}/{name}", 0)

    def begin(self, doing: str) -> None:
        """This rank gets on: it begins something."""
        self.tell(f"doing/{self.ranks.rank}", doing)
        self.count("progress")

    def hear(self, name: str, seconds: float | None = None, times: float = 1.0) -> Any:
        """What is told by that name, once it is; Silent after `seconds`, or when nobody gets on any more for so many
        `times` the usual patience.
        """
        limit = seconds or times * PATIENCE * self._seconds
        progress, until, pause = self.number("progress"), time.monotonic() + limit, FIRST_PAUSE
        while not self.has(
            name
        ):  # `wait` would keep the other threads of this process from the store, and log
            if time.monotonic() > until:
                now = self.number("progress")
                if now == progress or seconds is not None:
                    raise Silent(f"waited {limit:g} s for {name}")
                progress, until = now, time.monotonic() + limit
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)
        return json.loads(self._store.get(f"{PREFIX}/{name}"))

    def meet(self, name: str, num: int) -> None:
        """Returns when `num` ranks have called this with that name; Silent when some do not come."""
        if self.count(f"{name}/came") == num:
            self.tell(f"{name}/all", True)
        self.hear(f"{name}/all")

    def doing(self, rank: int) -> str:
        return self.hear(f"doing/{rank}") if self.has(f"doing/{rank}") else "starting"

    def part(self, num: int) -> None:
        """The end of `num` ranks: all wait a moment until the others have heard, since the board goes with rank 0."""
        try:
            if self.count("parted") == num:
                self.tell("over", True)
            self.hear("over", LONGEST_PART)
        except (RuntimeError, Silent):  # those who are gone need not hear
            return
