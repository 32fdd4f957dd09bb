"""To which checkpoint does a run go back, how often, and what does a later start make of it?"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pretrain import checkpoint, resume
from pretrain.checkpoint import store
from pretrain.checkpoint.__main__ import run
from pretrain.config import Guard
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.evidence import Journal
from pretrain.exits import Diverged
from pretrain.guard import StepGuard
from pretrain.initial.start import found
from pretrain.models.guides import own
from pretrain.models.guides.guide import Opened
from pretrain.rewind import go_back
from tests.engine.test_checkpoint import whole

LIMITS = Guard(window=5, deviations=0.0, skips=2, margin=1, rewinds=9)


class Training:
    """A run of one rank that is refused and goes back, without the model."""

    def __init__(self, out: Path, limits: Guard = LIMITS) -> None:
        self.out, self.place = out, checkpoint.checkpoints_of(out)
        out.mkdir(exist_ok=True)
        self.guard, self.journal = StepGuard(limits), Journal(out)

    def save(self, step: int) -> None:
        whole(self.place, step, guard=json.loads(json.dumps(self.guard.state_dict())))

    def refused_after(self, step: int) -> int:
        """Two refused steps in a row; the step of the checkpoint to which it goes back."""
        for _ in range(2):
            self.guard.judge(step, math.nan, {})
        folder, _ = go_back(self.guard, self.journal, self.place, self.out)
        self.guard.refused_in_a_row = []
        return checkpoint.step_of(folder)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    training = Training(tmp_path / "out")
    for step in (0, 10, 20, 30):
        training.save(step)
    return training


def test_without_progress_the_run_goes_back_to_an_older_one_each_time_but_not_to_the_beginning(
    training: Training,
) -> None:
    assert [training.refused_after(35) for _ in range(5)] == [30, 20, 10, 10, 10]
    assert [rewind.before for rewind in training.journal.rewinds()] == [0, 1, 2, 3, 4]


def test_the_beginning_is_gone_back_to_where_nothing_else_is_left(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.save(0)
    assert [training.refused_after(5) for _ in range(2)] == [0, 0]


def test_what_is_saved_on_the_new_way_is_taken_first_and_what_was_given_up_is_not(training: Training) -> None:
    assert [training.refused_after(35) for _ in range(3)] == [30, 20, 10]
    training.save(20)  # on the new way; that of step 30 is still of the old one
    assert training.refused_after(25) == 20
    assert training.refused_after(25) == 10
    assert training.journal.rewinds()[-1].before == 4


def test_a_checkpoint_behind_where_the_run_failed_is_progress(training: Training) -> None:
    assert [training.refused_after(35) for _ in range(2)] == [30, 20]
    training.save(30)
    training.save(40)
    assert training.refused_after(45) == 40
    assert training.journal.rewinds()[-1].before == 0


def test_as_many_batches_are_left_out_before_a_checkpoint_that_is_given_up(training: Training) -> None:
    training.refused_after(35)
    assert training.guard.left_out == {34, 35, 36}
    training.refused_after(35)
    assert training.guard.left_out == {28, 29, 33, 34, 35, 36, 37, 38, 39}


def test_a_later_start_does_not_take_what_was_given_up(training: Training) -> None:
    def next_start() -> Path | None:
        return resume.newest_or_none(training.place, Journal(training.out).rewinds())

    assert next_start() == training.place / "step_000030"
    training.refused_after(35)
    assert next_start() == training.place / "step_000030"
    training.refused_after(35)
    with pytest.warns(
        UserWarning, match=r"checkpoints of steps \[30\] .* are not used: the run has gone back"
    ):
        assert next_start() == training.place / "step_000020"
    training.save(30)
    assert next_start() == training.place / "step_000030"


def consolidated(out: Path) -> Path:
    """The checkpoint whose weights become one file."""
    run(["consolidate", str(out), "--out", str(out / "weights.safetensors")])
    with safe_open(out / "weights.safetensors", "pt") as file:
        return Path(file.metadata()["checkpoint"])


READERS: dict[str, Callable[[Path], object]] = {
    "evaluate, export and transfer": lambda out: find_checkpoint(out, "last"),
    "--init OUT": found,
    "--init OUT/checkpoints": lambda out: found(checkpoint.checkpoints_of(out)),
    "--guide": lambda out: own.open_run(out).folder,
    "consolidate": consolidated,
}


@pytest.mark.parametrize("reader", READERS)
def test_what_was_given_up_does_not_pass_for_the_last(
    reader: str, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = (0.0, 0.0, 0.0)
    monkeypatch.setattr(
        own, "open_checkpoint", lambda place: Opened(nn.Identity(), 1, 1, 1, none, none, place, ())
    )
    monkeypatch.setitem(checkpoint.WEIGHTS, "teacher", lambda folder: {"weight": torch.zeros(1)})
    newest = [training.refused_after(35) for _ in range(2)][-1]
    with pytest.warns(UserWarning, match=r"steps \[30\] .* are not used: the run has gone back"):
        assert READERS[reader](training.out) == training.place / f"step_{newest:06d}"


def test_a_run_whose_older_checkpoints_are_gone_does_not_call_those_that_it_gave_up_broken(
    training: Training,
) -> None:
    for _ in range(3):
        training.refused_after(35)
    for step in (0, 10):
        shutil.rmtree(training.place / f"step_{step:06d}")
    rewinds = training.journal.rewinds()
    with (
        pytest.warns(UserWarning, match="are not used"),
        pytest.raises(
            ValueError, match=r"^the run has gone back from those of steps \[20, 30\] in .*: copy older"
        ),
    ):
        resume.newest_or_none(training.place, rewinds)
    with (
        pytest.warns(UserWarning, match="are not used"),
        pytest.raises(FileNotFoundError, match=r"has gone back from all .* by its step, of \[20, 30\]"),
    ):
        find_checkpoint(training.out, "last")
    (whole(training.place, 10) / "COMPLETE").unlink()
    with (
        pytest.warns(UserWarning, match="are not used|is skipped"),
        pytest.raises(
            ValueError, match=r"steps \[10\] in .* is whole, and the run has gone back from those of"
        ),
    ):
        resume.newest_or_none(training.place, rewinds)


def test_checkpoints_of_a_run_that_went_back_are_passed_over_in_another_folder_too(
    training: Training, tmp_path: Path
) -> None:
    for _ in range(3):
        training.refused_after(35)
    training.save(20)
    training.save(30)
    other = Training(tmp_path / "other")
    other.place = training.place
    assert [other.refused_after(35) for _ in range(5)] == [30, 20, 10, 10, 10]


def test_a_checkpoint_is_read_again_only_where_it_is_taken(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.refused_after(35)
    read, sha256 = [], store.sha256
    monkeypatch.setattr(store, "sha256", lambda *what: read.append(str(what[0])[-2:]) or sha256(*what))
    assert training.refused_after(35) == 20 and set(read) == {"20"}
    read.clear()
    assert training.refused_after(35) == training.refused_after(35) == 10 and set(read) == {"10"}
    (training.place / "step_000010" / "teacher" / "weights").write_bytes(bytes(99) + b"\1")
    for step in (20, 30):
        shutil.rmtree(training.place / f"step_{step:06d}")
    with pytest.warns(UserWarning, match="step_000010 is skipped, since teacher/weights has changed"):
        assert training.refused_after(35) == 0


def test_the_run_ends_after_so_many_rewinds_whichever_checkpoints_they_took(training: Training) -> None:
    training.guard.limits = replace(LIMITS, rewinds=2)
    assert [training.refused_after(35) for _ in range(2)] == [30, 20]
    with pytest.raises(
        Diverged, match=r"has gone back 2 times to .*step_000010: batch .* larger guard.rewinds"
    ):
        training.refused_after(35)
