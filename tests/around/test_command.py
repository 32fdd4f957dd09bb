"""How does a command end: done, with a mistake told in one message, or interrupted?"""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.command import exit_code, require_place
from pretrain.exits import FAILED, INTERRUPTED
from pretrain.transfer import __main__ as transfer


def failing(error: BaseException) -> int:
    def work(arguments: list[str] | None) -> None:
        raise error

    return exit_code(work, ["--x"])


def test_a_command_hands_its_arguments_on_and_ends_well() -> None:
    given: list[list[str] | None] = []
    assert exit_code(given.append, ("--a", "1")) == 0
    assert exit_code(given.append) == 0
    assert given == [["--a", "1"], None]


def test_mistakes_are_told_and_others_are_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(ValueError("--x 3 must be even: take 4")) == FAILED
    assert failing(FileNotFoundError("no folder x")) == FAILED
    assert failing(KeyboardInterrupt()) == INTERRUPTED
    told = capsys.readouterr().err
    assert (
        told == "error: --x 3 must be even: take 4\nerror: no folder x\n\ninterrupted: nothing was written\n"
    )
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())


def test_an_interrupted_command_says_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(arguments: list[str] | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "run", interrupt)
    assert transfer.main([]) == INTERRUPTED
    assert capsys.readouterr().err.startswith("\ninterrupted: the same command goes on from the last state")


def test_a_place_that_takes_no_file_is_refused_before_the_work(tmp_path: Path) -> None:
    require_place("--out", tmp_path / "new" / "result.json")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"--out .*file/result.json cannot be written \(.*\): name another place"
    ):
        require_place("--out", tmp_path / "file" / "result.json")
