"""Which batch of the run's order comes next, where some are left out?

Batch k holds positions [k x batch, (k + 1) x batch) of the order, for any number of ranks. A batch that is left out
is a hole: every other one is taken once, in its place.
"""

from __future__ import annotations

from collections.abc import Collection


def next_kept(number: int, left_out: Collection[int]) -> int:
    """The first batch from `number` on that is not left out."""
    while number in left_out:
        number += 1
    return number


def after_kept(count: int, left_out: Collection[int]) -> int:
    """The batch that a run takes after `count` others."""
    number = count
    for hole in sorted(left_out):
        if hole > number:
            break
        number += 1
    return number
