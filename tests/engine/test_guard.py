"""Which steps are refused, and which batches does a run then do without?"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from pretrain.config import Guard
from pretrain.data.left_out import after_kept, next_kept
from pretrain.guard import StepGuard

LIMITS = Guard(window=5, deviations=20.0, norm_factor=10.0, loss_rise=0.5, skips=2, margin=2)
USUAL = [(1.0, 2.0), (1.1, 2.1), (0.9, 1.9), (1.0, 2.05), (1.05, 1.95)]  # gradient norm, loss


def guard_after(steps: int, limits: Guard = LIMITS) -> StepGuard:
    guard = StepGuard(limits)
    for step, (norm, loss) in enumerate(USUAL[:steps]):
        assert guard.judge(step, norm, {"pixels": loss}).is_accepted
    return guard


@pytest.mark.parametrize(
    ("norm", "loss", "reason"),
    [
        (30.0, 2.0, "gradient norm is 30, above"),
        (9.0, 2.0, None),  # below ten medians
        (1.0, 5.0, "pixels is 5, above"),
        (1.0, 2.9, None),  # below a median and a half
        (1e-9, 0.0, None),  # small is no spike
        (math.inf, 2.0, "gradient norm is inf"),
        (1.0, math.nan, "pixels is nan"),
    ],
)
def test_a_spike_is_far_above_what_was_accepted(norm: float, loss: float, reason: str | None) -> None:
    verdict = guard_after(5).judge(5, norm, {"pixels": loss})
    assert verdict.is_accepted == (reason is None)
    assert reason is None or verdict.reasons[0].startswith(reason)


def test_nothing_is_a_spike_until_the_window_is_full() -> None:
    assert guard_after(4).judge(4, 1e6, {"pixels": 1e6}).is_accepted
    assert not guard_after(4).judge(4, math.nan, {"pixels": 2.0}).is_accepted
    assert guard_after(5, replace(LIMITS, deviations=0.0)).judge(5, 1e6, {"pixels": 1e6}).is_accepted


def test_a_noisy_run_is_given_more_room() -> None:
    guard = StepGuard(LIMITS)
    for step, norm in enumerate((1.0, 3.0, 0.3, 2.0, 0.5)):
        guard.judge(step, norm, {"pixels": 2.0})
    assert guard.judge(5, 30.0, {"pixels": 2.0}).is_accepted


def test_a_resumed_guard_judges_alike() -> None:
    guard, resumed = guard_after(5), StepGuard(LIMITS)
    guard.judge(5, math.nan, {"pixels": 2.0})
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for norm in (1.0, 30.0, 9.0):
        assert resumed.judge(5, norm, {"pixels": 2.0}) == guard.judge(5, norm, {"pixels": 2.0})
    assert resumed.state_dict() == guard.state_dict()


def test_a_refused_batch_is_followed_by_the_next_for_the_same_step() -> None:
    guard = guard_after(5)
    assert [guard.judge(5, math.nan, {"pixels": 2.0}).batch for _ in range(2)] == [5, 6]
    assert [guard.next_batch(step) for step in (4, 5, 6)] == [4, 7, 8]


def test_going_back_leaves_out_what_led_there_more_each_time() -> None:
    for times, expected in ((0, [3, 4, 5, 6]), (1, [1, 2, 3, 4, 5, 6])):
        guard = guard_after(5)
        for _ in range(2):
            guard.judge(5, math.nan, {"pixels": 2.0})
        assert guard.leave_out_since(1, times) == expected
        assert guard.left_out == set(expected)


def test_every_batch_that_is_not_left_out_comes_once() -> None:
    left_out = {0, 3, 4, 9}
    taken = [after_kept(count, left_out) for count in range(8)]
    assert taken == [1, 2, 5, 6, 7, 8, 10, 11]
    assert [next_kept(number, left_out) for number in (0, 1, 3, 9)] == [1, 1, 5, 10]
