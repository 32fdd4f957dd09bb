"""May a step move the weights? Losses and gradient norm against those of the accepted steps before.

All ranks judge the same numbers, summed over the ranks and read in the one wait for the device that the gradient norm
needs anyway, before optimizer, teacher and balance move. A refused batch is left out of the run's order: the next one
is tried in its place, so that a run which refused a batch equals one which never had it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pretrain.config import Guard
from pretrain.data.left_out import after_kept

NORMAL = 1.4826  # median distance from the median x this = standard deviation of a normal distribution
SMALLEST_NORM = 1e-30  # its logarithm stands for that of 0
NORM = "gradient norm"


@dataclass(frozen=True)
class Verdict:
    """What a step's numbers say, equal on all ranks."""

    step: int  # accepted steps before this one
    batch: int  # number of its batch in the run's order
    norm: float  # of the whole gradient; inf where it is not finite
    losses: dict[str, float]  # nats by target, mean over ranks
    reasons: tuple[str, ...]  # why it is refused; empty when it is accepted

    @property
    def is_accepted(self) -> bool:
        return not self.reasons


class StepGuard:
    """The last accepted numbers of one run and the batches that are left out of it; `judge` once a step."""

    def __init__(self, limits: Guard) -> None:
        self.limits = limits
        self.left_out: set[int] = set()  # numbers of batches
        self.refused_in_a_row: list[Verdict] = []
        self.num_refused = 0  # of the run
        self.rewinds: list[float] = []  # of the run: when it has gone back, in seconds since 1970
        self._names: tuple[str, ...] = ()
        self._accepted: deque[tuple[float, ...]] = deque(maxlen=limits.window)  # of NORM its logarithm

    def next_batch(self, step: int) -> int:
        """Number of the batch that a run takes after `step` accepted ones."""
        return after_kept(step, self.left_out)

    def judge(self, step: int, norm: float, losses: Mapping[str, float]) -> Verdict:
        """The verdict on step `step`; what it accepts becomes part of the measure, what it refuses a hole."""
        batch = self.next_batch(step)
        values = {NORM: math.log(max(norm, SMALLEST_NORM)) if norm < math.inf else norm, **losses}
        if tuple(values) != self._names:
            self._names = tuple(values)
            self._accepted.clear()
        reasons = tuple(reason for name in values for reason in self._reasons(name, values[name]))
        verdict = Verdict(step, batch, norm, dict(losses), reasons)
        if verdict.is_accepted:
            self._accepted.append(tuple(values.values()))
            self.refused_in_a_row = []
        else:
            self.left_out.add(batch)
            self.refused_in_a_row.append(verdict)
            self.num_refused += 1
        return verdict

    def _reasons(self, name: str, value: float) -> list[str]:
        if not math.isfinite(value):
            return [f"{name} is {value}"]
        limits = self.limits
        if not limits.deviations or len(self._accepted) < limits.window:
            return []
        before = [row[self._names.index(name)] for row in self._accepted]
        median = statistics.median(before)
        deviation = NORMAL * statistics.median(abs(one - median) for one in before)
        far = limits.deviations * deviation
        if name == NORM:
            limit = median + max(far, math.log(limits.norm_factor))
            told, usual, most = math.exp(value), math.exp(median), math.exp(limit)
        else:
            limit = median + max(far, limits.loss_rise * abs(median))
            told, usual, most = value, median, limit
        if value <= limit:
            return []
        return [
            f"{name} is {told:.4g}, above {most:.4g} (median of {len(before)} accepted steps: {usual:.4g})"
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge alike and to leave out the same batches; fit for JSON."""
        return {
            "names": list(self._names),
            "accepted": [list(row) for row in self._accepted],
            "left_out": sorted(self.left_out),
            "rewinds": len(self.rewinds),
            "last_rewind": self.rewinds[-1] if self.rewinds else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; what is left out already stays so, and rewinds stay counted."""
        self._names = tuple(state["names"])
        self._accepted = deque(map(tuple, state["accepted"]), maxlen=self.limits.window)
        self.left_out |= set(state["left_out"])
        self.refused_in_a_row = []

    def leave_out_since(self, first: int, times: int, ends: Sequence[int] = ()) -> Sequence[int]:
        """The refused batches in a row, and with them `margin` x 2^times accepted ones before, not before `first`.

        As many are left out before each of `ends`, where a checkpoint was written that is of no use.
        """
        refused = [verdict.batch for verdict in self.refused_in_a_row]
        wanted, before = self.limits.margin * 2**times, set[int]()
        for end in (refused[0], *ends):
            accepted = (number for number in range(end - 1, first - 1, -1) if number not in self.left_out)
            before |= set(islice(accepted, wanted))
        self.left_out |= {*refused, *before}
        return sorted({*refused, *before})
