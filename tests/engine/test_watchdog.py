"""How often does a rank give a sign of life, and is its last word told?"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from pretrain import watchdog
from pretrain.tellers import is_of_device
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


def test_without_signs_to_read_a_rank_still_knows_of_itself(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 2, 0.5) as dog:
        dog.at(7, "waits for a batch")
        shutil.rmtree(tmp_path / "ranks")
        told, is_teller = dog.lost()
        assert is_teller and "rank 0 " in told and "after step 7, while it waits for a batch" in told
        dog.at(8, "is in step 8")
        assert json.loads((tmp_path / "ranks" / "rank_00000.json").read_text())["step"] == 8


def test_of_ranks_that_wait_for_a_checkpoint_the_one_is_named_whose_part_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "LONG", 0.0)
    dogs = [Watchdog(tmp_path, number, 3, 600) for number in range(3)]
    with ExitStack() as held:
        for dog in dogs:
            dog.interval = 0.02
            held.enter_context(dog)
            dog.at(3, "saves a checkpoint")
        told, is_teller = dogs[0].lost()
        assert is_teller and told.startswith("all 3 ranks wait for each other")
        dogs[1].beside("writes its part of step_000003")
        told, _ = dogs[0].lost()
        assert told.startswith("rank 1 (host ") and told.endswith(
            "after step 3, while it saves a checkpoint and, beside that, writes its part of step_000003: the others "
            "wait for it"
        )
        monkeypatch.setattr(watchdog, "LONG", 0.5)  # it has only begun: something else hangs
        assert dogs[0].lost()[0].startswith("all 3 ranks wait for each other")


@pytest.mark.parametrize(
    ("error", "is_device"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("[gloo] Connection reset by peer"), False),
    ],
)
def test_a_gpu_that_fails_is_told_from_too_little_memory(error: RuntimeError, is_device: bool) -> None:
    assert is_of_device(error) == is_device
