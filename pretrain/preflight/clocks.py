"""How far do the clocks of the nodes stand from each other?

No message says when it was read. But whoever has passed a meeting of all knows that everybody had entered it: with
the time at which each node entered and left, by its own clock, (clock of b - clock of a) is at most what b's showed
on leaving less what a's showed on entering, for every pair and every meeting. The best of several bounds it from
both sides, to the milliseconds that a meeting takes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median_low
from typing import Any

from pretrain.preflight.check import Here
from pretrain.preflight.told import Judged, Problem, Told

MEETINGS = 6
WATCHED = 0.1  # seconds in which the clock must run forward, as another clock does
LEAST_SHARE, MOST_SHARE = 0.5, 2.0  # of those, that the wall clock may count meanwhile


def look_at_clock(here: Here) -> dict[str, Any]:
    """Wall clock in seconds on entering and leaving each meeting, and what it counts in WATCHED seconds."""
    times = []
    for number in range(MEETINGS):
        entered = time.time()
        here.board.meet(f"clock/{number}", here.ranks.nodes)
        times.append([entered, time.time()])
    begun, wall, steps_back = time.monotonic(), time.time(), 0
    last = wall
    while time.monotonic() - begun < WATCHED:
        time.sleep(0.005)
        now = time.time()
        steps_back += now < last
        last = now
    return {"times": times, "steps_back": steps_back, "share": (last - wall) / (time.monotonic() - begun)}


def offset(times: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Clock of the first less that of the other, in seconds, and how far from that it may be."""
    most = min(mine[1] - other[0] for mine, other in zip(times, others, strict=True))
    least = max(mine[0] - other[1] for mine, other in zip(times, others, strict=True))
    return (most + least) / 2, abs(most - least) / 2


def judge_clock(told: Sequence[Told], here: Here) -> Judged:
    """Each node's offset from the median node's clock."""
    limit = here.options.max_skew
    from_first = {one.place: offset(one.value["times"], told[0].value["times"]) for one in told}
    # Of two nodes none is the middle: the first is.
    middle = 0.0 if len(told) == 2 else median_low(value for value, _ in from_first.values())
    remedy = "synchronise its clock (chronyc makestep, timedatectl): locks compare times, and S3 refuses signatures"
    problems = [
        Problem(place, f"its clock is {value - middle:+.3f} s from the others'", remedy)
        for place, (value, doubt) in from_first.items()
        if abs(value - middle) - doubt > limit
    ]
    problems += [
        Problem(one.place, f"its clock steps back or runs at {one.value['share']:.2f} of the time", remedy)
        for one in told
        if one.value["steps_back"] or not LEAST_SHARE < one.value["share"] < MOST_SHARE
    ]
    widest = max(abs(value - middle) for value, _ in from_first.values())
    doubt = max(doubt for _, doubt in from_first.values())
    value = (
        f"within {widest * 1e3:.0f} ms, give or take {doubt * 1e3:.0f} ms"
        if len(told) > 1
        else "runs forward"
    )
    return Judged(value, f"less than {limit:g} s between nodes, never back", problems)
