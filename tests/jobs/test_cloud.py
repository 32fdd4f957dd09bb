"""Does the task for SkyPilot start each machine as one of many, and is it recovered when it can go on?"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.exits import LOST, PREEMPTED
from tests.jobs.stubs import launched, write_launcher
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


def _run_block(tmp_path: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    write_launcher(tmp_path)
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
