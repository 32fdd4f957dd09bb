"""What has a run cost so far, and what will it? All time that was paid, also of what a rewind or a kill undid."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pretrain.intact import write_text
from pretrain.monitor.log import LOG, records

SPENT = "spent.json"  # in a run's folder: GPU-hours until the last start, or until its log was cut last


class Spent:
    """Hours of the ranks, from `begun` (time.monotonic()) on, with `gpu_hours` of earlier starts.

    Imports before `begun` are not counted, nor what a start did after it last told them.
    """

    def __init__(
        self, world: int, price: float | None = None, gpu_hours: float = 0.0, begun: float | None = None
    ) -> None:
        self._world, self._price, self._before = world, price, gpu_hours  # price of an hour of one GPU
        self._begun = time.monotonic() if begun is None else begun
        self._pace: float | None = None  # seconds of a step, of late

    def after(self, seconds: float, remaining: int) -> dict[str, float]:
        """Figures now, after steps of so many seconds each, with `remaining` steps to go."""
        # The first steps warm up: the pace forgets them by half with every line.
        self._pace = seconds if self._pace is None else (self._pace + seconds) / 2
        left = remaining * self._pace
        hours = {"gpu_hours": self._so_far(), "gpu_hours_left": self._world * left / 3600}
        if self._price is not None:
            costs = {name.replace("gpu_hours", "cost"): self._price * value for name, value in hours.items()}
            hours |= costs
        return {"eta_seconds": left, **hours}

    def keep(self, out: Path, say: Callable[[str], object]) -> None:
        """Call it before the log is cut, whose lines tell what was spent; what finds no room is told."""
        try:
            write_text(out / SPENT, json.dumps({"gpu_hours": self._so_far()}))
        except OSError as error:  # the next line of the log tells more
            say(
                f"the hours so far found no room in {out / SPENT} ({error}): should the run be killed before the "
                "next line of its log, it forgets those of the steps that are undone now; free space there"
            )

    def _so_far(self) -> float:
        return self._before + self._world * (time.monotonic() - self._begun) / 3600


def spent_before(out: Path) -> float:
    """GPU-hours that the starts of a run have told, also in lines of the log that a resume cuts; kept for the next.

    Call it before the log is opened.
    """
    told = [line["gpu_hours"] for line in records(out / LOG, until=float("inf")) if "gpu_hours" in line]
    with suppress(
        FileNotFoundError, ValueError, KeyError, TypeError
    ):  # of a first start, or an older version
        told.append(float(json.loads((out / SPENT).read_text())["gpu_hours"]))
    total = max(told, default=0.0)
    write_text(out / SPENT, json.dumps({"gpu_hours": total}))
    return total


def forget(out: Path) -> None:
    """A run begins in the folder of an earlier one, whose hours are not its own."""
    (out / SPENT).unlink(missing_ok=True)
