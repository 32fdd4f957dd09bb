"""Is a run's folder written by one process at a time, and free again when that process is gone?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import claim
from pretrain.lock import Busy, only_saver, only_writer
from pretrain.refused import leaving_nothing
from pretrain.watchdog import Watchdog
from tests.data.s3 import s3_store
from tests.paths import ROOT

HOLD = (
    "import sys; from pathlib import Path; from pretrain.lock import only_writer\n"
    "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    message = rf"is being written by process {holder.pid} on .*: wait for it, end it, or name another --out"
    with pytest.raises(ValueError, match=message), only_writer(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    with only_writer(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")


def test_a_folder_without_locks_is_still_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("pretrain.lock.fcntl.flock", no_locks)
    refusal = pytest.warns(UserWarning, match=r"cannot be locked \(no locks available\): start no second run")
    with refusal, only_writer(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"--out /proc/run cannot be made or written .* name another folder"),
        only_writer(Path("/proc/run")),
    ):
        pass


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_start_that_is_refused_leaves_nothing(error: type[Exception], tmp_path: Path) -> None:
    def refused(out: Path, num_ranks: int = 1, wrote: str = "") -> list[str]:
        was_there = out.exists()
        with (
            pytest.raises(error),
            only_writer(out),
            leaving_nothing(out, num_ranks, was_there=was_there),
            Watchdog(out, 0, num_ranks, 60.0),
        ):
            if wrote:
                (out / wrote).touch()
            raise error("refused")
        return sorted(path.name for path in out.parent.rglob("*"))

    assert refused(tmp_path / "run") == []
    (tmp_path / "run").mkdir()
    assert refused(tmp_path / "run") == ["run"]
    assert "rank_00000.json" in refused(tmp_path / "run", 2)  # the other one may still look at it
    assert refused(tmp_path / "more" / "run", wrote="log.jsonl") == [
        ".lock",
        "log.jsonl",
        "rank_00000.json",
        "ranks",
        "run",
    ]


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"lies below a file .* name another"),
        only_writer(tmp_path / "file" / "run"),
    ):
        pass


def test_two_runs_do_not_keep_their_checkpoints_in_one_folder(tmp_path: Path) -> None:
    refusal = pytest.raises(Busy, match=r"is being written by process .*, or name another --checkpoints")
    with only_saver(tmp_path), refusal, only_saver(tmp_path):
        pass
    with only_saver(tmp_path) as require:
        require()


def test_two_runs_do_not_keep_their_checkpoints_behind_one_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "SETTLE", 0.0)
    monkeypatch.setattr(claim, "BEAT", 0.3)
    place = "s3://bucket/run/checkpoints"
    with s3_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        refusal = pytest.raises(Busy, match=r"by process \d+ on .*: wait .*, or name another --checkpoints")
        with only_saver(place) as require:
            with refusal, only_saver(place):
                pass
            require()
            store.files.pipe_file(f"{place}/.build/claim", b'{"owner": "another"}')
            with pytest.raises(OSError, match="was taken over by another process"):
                require()
        store.files.rm_file(f"{place}/.build/claim")
        with only_saver(place):
            pass
        assert not store.files.exists(f"{place}/.build/claim")
