"""How does a command end: done, with a mistake told in one message, or interrupted?"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.command import exit_code, exit_code_of_words, require_place
from pretrain.evaluate.arguments import split_folders
from pretrain.evaluate.subjects import find_subjects
from pretrain.exits import FAILED, INTERRUPTED
from pretrain.export.__main__ import main as export
from pretrain.models.guides import open_guide
from pretrain.named_folders import named_folders
from pretrain.report.__main__ import main as report
from pretrain.transfer import __main__ as transfer
from pretrain.transfer.places import Named, open_sets
from tests.paths import ROOT


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
    assert transfer.main(["segment", "run"]) == INTERRUPTED
    assert capsys.readouterr().err.startswith("\ninterrupted: the same command goes on from the last state")


@pytest.mark.parametrize(("rank", "told"), [("0", "error: --x 3 must be even\n"), ("1", "")])
def test_a_mistake_in_words_is_told_by_the_first_rank(
    rank: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(arguments: list[str] | None) -> None:
        raise ValueError(f"--x {arguments[0]} must be even")

    monkeypatch.setenv("RANK", rank)
    assert exit_code_of_words(check, ["3"]) == FAILED
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (
            "transfer",
            ["segment", "run", "--recipe", "smal"],
            "--recipe 'smal' is unknown for `segment`; choose",
        ),
        ("transfer", ["segment", "run", "--workers", "-1"], "--workers -1 must not be negative"),
        (
            "evaluate",
            ["run", "--data", "d", "--probes", "kn"],
            "probes ['kn'] are unknown; choose from ['knn'",
        ),
        ("evaluate", ["run", "--data", "nowhere"], "nowhere/train is no folder: `python -m data_prep"),
        ("report", ["run", "--candidates", "0"], "--candidates 0 must be at least 1"),
    ],
)
def test_a_mistake_in_words_is_told_before_torch_is_loaded(
    module: str, words: list[str], message: str
) -> None:
    program = f"""
import runpy, sys
sys.argv = ["python -m pretrain.{module}", *{words!r}]
try:
    runpy.run_module("pretrain.{module}", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == FAILED and done.stderr.startswith(f"error: {message}"), done.stderr


@pytest.mark.parametrize(("name", "kind"), [
    ("pipe", "a pipe"),
    ("socket", "a socket"),
    ("/dev/null", "a device"),
    ("link", "a link that leads nowhere"),
])  # fmt: skip
def test_what_is_no_folder_is_told_as_what_it_is(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    os.mkfifo("pipe")
    Path("link").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    told = f"{name} is no folder, but {kind}: "
    with pytest.raises(FileNotFoundError, match=f"^{told}name the --out folder"):  # of evaluate and transfer
        find_subjects(Path(name), ["last"])
    assert export([name, "--to", "timm"]) == FAILED
    assert capsys.readouterr().err.startswith(f"error: {told}name the --out folder")
    with pytest.raises(FileNotFoundError, match=told):
        split_folders(None, Path(name), tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^guide {told}name one of"):
        open_guide(Path(name))
    with pytest.raises(FileNotFoundError, match=f"^{told}name the --out folder"):
        report([name])
    with pytest.raises(FileNotFoundError, match=f"^--data x={name}: {told[:-2]}; name one that exists"):
        named_folders("--data", [f"x={name}"])  # of compare and the training too
    with pytest.raises(FileNotFoundError, match=told):
        open_sets("segment", Named(data=Path(name)), 0.0)


def test_a_place_that_takes_no_file_is_refused_before_the_work(tmp_path: Path) -> None:
    require_place("--out", tmp_path / "new" / "result.json")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"--out .*file/result.json cannot be written \(.*\): name another place"
    ):
        require_place("--out", tmp_path / "file" / "result.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "file" / "result.json")
    with pytest.raises(ValueError, match=r"--out .*file/result.json cannot be written"):
        require_place("--out", tmp_path / "link.json")
