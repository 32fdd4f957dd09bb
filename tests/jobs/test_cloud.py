"""Does the task for SkyPilot start each machine as one of many, and is it recovered when it can go on?"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain import intact, restarts
from pretrain.checkpoint import checkpoint_folder, checkpoints_of
from pretrain.exits import FAILED, FINISHED, LOST, PREEMPTED
from tests.jobs.stubs import launched, write_launcher, write_program
from tests.paths import ROOT

TASK: dict[str, Any] = yaml.safe_load((ROOT / "jobs" / "cloud" / "skypilot.yaml").read_text())


def test_a_cloud_task_is_recovered_when_it_can_go_on() -> None:
    assert TASK["resources"]["use_spot"] and TASK["num_nodes"] > 1
    recovery = TASK["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [PREEMPTED, LOST]}
    assert TASK["file_mounts"]["/data"]["source"].startswith("s3://${BUCKET}/")
    assert "make venv" in TASK["setup"]
    known = {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert set(TASK) <= known


def _run_block(tmp_path: Path, code: int = 0, **changed: str) -> subprocess.CompletedProcess[str]:
    """On machine 2 of three; TMP_PATH/asked gets the arguments of pretrain.restarts, which ends with `code` and
    prints TELLS; TMP_PATH/counted what the ranks know of it."""
    write_launcher(tmp_path, f'echo "$M3I_STARTS_COUNTED" >{tmp_path}/counted')
    asked = f'echo "$@" >{tmp_path}/asked; echo "${{TELLS-1}}"; exit {code}'
    python = f'case $1 in -) echo "1 29500" ;; *) {asked} ;; esac'
    write_program(tmp_path / "bin" / "python", python)
    sky = {
        "SKYPILOT_NUM_NODES": "3",
        "SKYPILOT_NODE_RANK": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n10.0.0.6",
    }
    given = {name: value or "" for name, value in TASK["envs"].items()} | sky
    given |= {"PATH": os.environ["PATH"], "ENV": str(tmp_path), "PREFLIGHT": "0"} | changed
    return subprocess.run(
        ["bash", "-c", TASK["run"]],
        cwd=ROOT,
        env=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_cloud_task_starts_the_machine_that_skypilot_says(tmp_path: Path) -> None:
    ended = _run_block(tmp_path, BUCKET="bucket")
    assert ended.returncode == 0, ended.stderr
    envs = TASK["envs"]
    assert launched(tmp_path) == [
        *[
            "--quiet",
            "--master_addr",
            "10.0.0.4",
            "--master_port",
            "29500",
            "--hostfile",
            "HOSTFILE",
            "--no_ssh",
        ],
        *f"--node_rank 2 {ROOT}/pretrain/main.py --recipe {envs['RECIPE']} --data".split(),
        *envs["DATA"].split(),
        *f"--out runs/{envs['RUN']} --checkpoints s3://bucket/checkpoints/{envs['RUN']}".split(),
        *envs["ARGUMENTS"].split(),
    ]


@pytest.mark.parametrize("name", ["BUCKET", "RECIPE", "DATA", "RUN"])
def test_a_cloud_task_names_the_variable_that_is_missing(name: str, tmp_path: Path) -> None:
    refused = _run_block(tmp_path, **{"BUCKET": "bucket"} | {name: ""})
    assert refused.returncode != 0
    assert f"{name}: is not set" in refused.stderr


def test_the_first_machine_alone_counts_the_starts_of_a_task(tmp_path: Path) -> None:
    assert _run_block(tmp_path, BUCKET="bucket").returncode == 0
    assert not (tmp_path / "asked").exists()
    ended = _run_block(
        tmp_path, BUCKET="bucket", SKYPILOT_NODE_RANK="0", SKYPILOT_TASK_ID="sky-7", RESTARTS="4"
    )
    assert ended.returncode == 0 and launched(tmp_path)
    place = f"s3://bucket/checkpoints/{TASK['envs']['RUN']}"
    assert (tmp_path / "asked").read_text() == f"-m pretrain.restarts {place} sky-7 4\n"
    assert (tmp_path / "counted").read_text() == "1\n"
    assert not _run_block(tmp_path, BUCKET="bucket", SKYPILOT_NODE_RANK="0", TELLS="").returncode
    assert (tmp_path / "counted").read_text() == "\n", "it ends then where the bucket still fails"


def test_a_task_that_does_not_get_on_ends_before_training_and_is_not_recovered(tmp_path: Path) -> None:
    ended = _run_block(tmp_path, code=FAILED, BUCKET="bucket", SKYPILOT_NODE_RANK="0")
    assert ended.returncode == FAILED and not (tmp_path / "arguments").exists()
    assert FAILED not in TASK["resources"]["job_recovery"]["recover_on_exit_codes"]


def test_a_number_of_restarts_that_is_none_is_told(tmp_path: Path) -> None:
    refused = _run_block(tmp_path, BUCKET="bucket", RESTARTS="some")
    assert refused.returncode == 2 and "RESTARTS=some is no number from 1" in refused.stderr


def write_checkpoint(out: Path, step: int) -> None:
    partial = out / ".partial"
    partial.mkdir(parents=True)
    (partial / "state.json").write_text("{}")
    intact.publish(partial, checkpoint_folder(out, step), intact.digest(partial, intact.files_in(partial)))


def test_starts_without_a_newer_checkpoint_end_a_task_and_a_newer_one_begins_the_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(checkpoints_of(tmp_path))

    def starts(task: str, number: int) -> list[int]:
        return [restarts.main([place, task, "3"]) for _ in range(number)]

    assert starts("sky-1", 3) == [FINISHED] * 3
    write_checkpoint(tmp_path, 100)
    assert starts("sky-1", 4) == [FINISHED] * 3 + [FAILED]
    told = capsys.readouterr().err
    assert told.startswith(
        f"3 starts in a row made no checkpoint in {place}, whose newest is that of step 100; "
    )
    assert "RESTARTS=3" in told and "launch it again" in told
    assert starts("sky-1", 3) == [FINISHED] * 3  # who has looked at it begins to count anew
    assert starts("sky-2", 3) == [FINISHED] * 3  # another task as well
    (tmp_path / "checkpoints" / "step_000200").mkdir()  # a kill during a save leaves no checkpoint
    assert starts("sky-2", 1) == [FAILED]


def test_what_the_starts_came_to_is_kept_behind_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    place = "memory://restarts/run"
    assert [restarts.main([place, "sky-1", "2"]) for _ in range(3)] == [FINISHED, FINISHED, FAILED]
    assert capsys.readouterr().out == "1\n" * 2


def test_a_record_that_is_damaged_is_told_and_counting_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for damaged in (
        "{",
        "[]",
        '{"other": 1}',
        '{"task": "task", "step": null}',
        '{"task": "task", "step": 2, "vain": "0"}',
    ):
        (tmp_path / restarts.RECORD).write_text(damaged)
        assert restarts.main([str(tmp_path), "sky-1", "1"]) == FINISHED
        assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("503"), PermissionError("no rights"), ValueError("no such store")])
def test_a_place_that_cannot_be_asked_ends_no_task(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def latest(place: object) -> None:
        raise error

    monkeypatch.setattr(restarts, "latest", latest)
    monkeypatch.setattr(restarts, "PATIENCE", 0.3)
    assert restarts.main(["memory://restarts/away", "sky-1", "1"]) == FINISHED
    told = capsys.readouterr()
    assert str(error) in told.err and not told.out


def test_a_place_that_does_not_answer_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(restarts, "PATIENCE", 0.05)
    monkeypatch.setattr(restarts, "latest", lambda place: never.wait())
    assert restarts.main(["memory://restarts/silent", "sky-1", "1"]) == FINISHED
    never.set()


def test_the_count_is_a_program_that_a_task_can_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain.restarts", str(tmp_path), "sky-1", "1"]
    ended = [subprocess.run(command, cwd=ROOT, check=False, timeout=60).returncode for _ in range(2)]
    assert ended == [FINISHED, FAILED]
