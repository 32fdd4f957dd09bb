"""How often does a rank give a sign of life, and is its last word told?"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pretrain import watchdog
from pretrain.watchdog import FEW, Watchdog


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Grows by the time of every sign that is given."""
    given, own = [], Watchdog._say

    def say(dog: Watchdog) -> None:
        given.append(time.monotonic())
        own(dog)

    monkeypatch.setattr(Watchdog, "_say", say)
    return given


def told(out: Path) -> str:
    return json.loads((out / "ranks" / "rank_00000.json").read_text())["doing"]


def test_few_ranks_write_every_sign_at_once(tmp_path: Path, signs: list[float]) -> None:
    with Watchdog(tmp_path, 0, FEW, 600) as dog:
        for step in range(20):
            dog.at(step, f"is in step {step}")
            assert told(tmp_path) == f"is in step {step}"
    assert len(signs) >= 20


def test_many_ranks_together_write_no_more_than_a_file_system_bears(
    tmp_path: Path, signs: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "MOST_SIGNS", 2560)  # of 256 ranks: one in 0.1 seconds
    begun = time.monotonic()
    with Watchdog(tmp_path, 0, 256, 600) as dog:
        for step in range(200):
            dog.at(step, f"is in step {step}")
            time.sleep(0.001)
        until = time.monotonic() + 10
        while told(tmp_path) != "is in step 199" and time.monotonic() < until:
            time.sleep(0.01)
        assert told(tmp_path) == "is in step 199", "the thread tells what `at` did not"
    assert 3 <= len(signs) <= 3 + 2 * (time.monotonic() - begun) / 0.1
