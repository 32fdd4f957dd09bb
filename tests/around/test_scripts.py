"""Do the Makefile, the job scripts and the ds configs hold together?"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.exits import LOST, PREEMPTED
from tests.jobs.stubs import run_script
from tests.paths import ROOT

SCRIPTS = sorted([*(ROOT / "jobs").rglob("*.sh"), ROOT / ".ci" / "run"])
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
# One owner per number: these belong to the recipe (style.md of the project, README).
OWNED_BY_RECIPE = {"train_batch_size", "gradient_clipping", "scheduler", "optimizer"}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_demo_runs_its_six_steps_in_order(tmp_path: Path) -> None:
    planned = make("-n", "demo", f"VENV={tmp_path}/venv", f"DATA={tmp_path}/data", f"RUN={tmp_path}/run")
    assert planned.returncode == 0, planned.stderr
    steps = [
        "-m pip install",
        f"data_prep build scenes --out {tmp_path}/data/labelled",
        f"data_prep build scenes --out {tmp_path}/data/captioned",
        "jobs/local/pretrain.sh --recipe m3i.demo",
        "-m pretrain.evaluate",
        "-m pretrain.export",
        "-m pretrain.report",
    ]
    positions = [planned.stdout.find(step) for step in steps]
    assert -1 not in positions, dict(zip(steps, positions, strict=True))
    assert positions == sorted(positions)


def test_demo_skips_what_is_there_and_newer(tmp_path: Path) -> None:
    venv, data, run = tmp_path / "venv", tmp_path / "data", tmp_path / "run"
    outputs = [
        venv / ".requirements.txt",
        data / "labelled/heldout/manifest.json",
        data / "captioned/heldout/manifest.json",
        run / "finished",
        run / "evaluation.json",
        run / "exported",
        run / "report.html",
    ]
    newest = int((ROOT / "requirements.txt").stat().st_mtime)
    for age, path in enumerate(outputs, start=1):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (newest + age, newest + age))
    folders = (f"VENV={venv}", f"DATA={data}", f"RUN={run}")
    assert "-m " not in make("-n", "demo", *folders).stdout
    (run / "evaluation.json").unlink()
    planned = make("-n", "demo", *folders).stdout
    assert "pretrain.evaluate" in planned
    assert "pretrain.report" in planned
    assert "pretrain.sh" not in planned
    assert "data_prep" not in planned


@pytest.mark.parametrize("target", ["test", "lint", "venv", "clean"])
def test_target_parses(target: str) -> None:
    planned = make("-n", target)
    assert planned.returncode == 0, planned.stderr


def test_help_names_every_public_target() -> None:
    shown = make("help").stdout
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    assert {line.split()[0] for line in shown.splitlines() if line[:1].islower()} >= set(declared[1].split())


def test_venv_asks_for_a_python_that_fits(tmp_path: Path) -> None:
    refused = make("venv", f"VENV={tmp_path}/venv", "PYTHON=")
    assert refused.returncode != 0
    assert "make PYTHON=..." in refused.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_is_executable_bash(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n# ")
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    checked = subprocess.run(
        ["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True, check=False, timeout=60
    )
    assert checked.returncode == 0, checked.stdout


def test_local_job_wants_arguments() -> None:
    refused = run_script("jobs/local/pretrain.sh")
    assert refused.returncode == 2
    assert "--recipe" in refused.stderr


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANKS": "x"}, "RANKS=x is no number from 1"),
        ({"RANKS": "0"}, "RANKS=0 is no number from 1"),
        ({"NODES": "08"}, "NODES=08 is no number from 1"),
        (
            {"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "NODE_RANK=2 is not one of the 2",
        ),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({"PREFLIGHT": "yes"}, "PREFLIGHT=yes is neither 0 nor 1"),
        ({"LOGS": "/proc/x"}, "LOGS=/proc/x cannot be made or written"),
    ],
)
def test_local_job_names_the_variable_that_cannot_be_right(environment: dict[str, str], named: str) -> None:
    refused = run_script("jobs/local/pretrain.sh", "--recipe", "m3i.demo", **environment)
    assert refused.returncode == 2
    assert named in refused.stderr


@pytest.mark.parametrize("asking", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_is_asked_before_it_has_ranks_ends_as_one_that_saved(
    tmp_path: Path, asking: signal.Signals
) -> None:
    _write_stubs(tmp_path, "exit 1")
    (tmp_path / "bin" / "python").write_text(f"#!/usr/bin/env bash\ntouch {tmp_path}/asks\nsleep 5\n")
    job = subprocess.Popen(
        [str(ROOT / "jobs/local/pretrain.sh"), "--recipe", "m3i.demo"],
        env=os.environ | {"ENV": str(tmp_path)},
    )
    while not (tmp_path / "asks").exists():
        time.sleep(0.02)
    job.send_signal(asking)
    assert job.wait(20) == PREEMPTED


def test_what_a_variable_says_is_not_said_twice(tmp_path: Path) -> None:
    for script in ("single_node/pretrain.sh", "slurm/submit.sh"):
        refused = run_script(f"jobs/{script}", "--steps", "4", "--out=elsewhere", OUT=str(tmp_path))
        assert refused.returncode == 2
        assert "--out=elsewhere is given, and OUT says the same" in refused.stderr


def test_local_job_names_the_environment_that_does_not_fit(tmp_path: Path) -> None:
    refused = run_script("jobs/local/pretrain.sh", "--recipe", "m3i.demo", ENV=str(tmp_path))
    assert refused.returncode != 0
    assert str(tmp_path) in refused.stderr
    assert "make venv" in refused.stderr


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, "OUT"),
        ({"OUT": "out"}, "ENV"),
        ({"OUT": "out", "ENV": "env"}, "DATA_<NAME>"),
        ({"OUT": "out", "ENV": "env", "DATA_CC12M": "/nowhere"}, "DATA_CC12M=/nowhere"),
    ],
)
def test_single_node_job_names_the_variable_that_is_missing(environment: dict[str, str], named: str) -> None:
    refused = run_script("jobs/single_node/pretrain.sh", **environment)
    assert refused.returncode != 0
    assert named in refused.stderr


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
def test_ds_config_owns_memory_and_communication_only(path: Path) -> None:
    config = json.loads(path.read_text())
    assert config["zero_optimization"]["stage"] in (1, 2, 3)
    assert not OWNED_BY_RECIPE & set(config)


def test_ds_config_of_every_job_exists() -> None:
    named = {name for script in SCRIPTS for name in re.findall(r"ds_configs/\w+\.json", script.read_text())}
    assert named, "no job names a ds config"
    assert all((ROOT / name).is_file() for name in named), named


# A rank: the job lets SIGUSR1 pass by all that does not ask for it, so bash could not hear it.
RANK = """import os, pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
LAUNCHER = f"""# What `deepspeed` starts: a launcher that starts ranks, and gives the first code that is not 0.
bash -c 'for rank in 0 1; do {sys.executable} $FOLDER/rank.py $FOLDER/rank_$rank & done
trap "exit 1" TERM; code=0; wait -n || code=$?; kill $(jobs -p); exit $code' &
wait $!
"""


def _write_stubs(folder: Path, launcher: str) -> None:
    """An environment in FOLDER/bin with this as its launcher; its Python is asked for GPUs and a free port."""
    (folder / "bin").mkdir()
    for name, text in {"deepspeed": launcher, "python": "echo 0 29500"}.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)


def _job_with_two_ranks(folder: Path) -> subprocess.Popen[bytes]:
    """jobs/local/pretrain.sh with a launcher whose ranks wait to be asked; both ranks are there."""
    _write_stubs(folder, LAUNCHER)
    (folder / "rank.py").write_text(RANK)
    job = subprocess.Popen(
        [str(ROOT / "jobs/local/pretrain.sh"), "--recipe", "m3i.demo"],
        env=os.environ | {"ENV": str(folder), "FOLDER": str(folder)},
    )
    while not all((folder / f"rank_{rank}").is_file() for rank in (0, 1)):
        assert job.poll() is None, "the job ended before its ranks began"
        time.sleep(0.02)
    return job


@pytest.mark.parametrize("asking", [signal.SIGTERM, signal.SIGUSR1])
def test_a_local_job_that_is_asked_to_stop_asks_its_ranks_and_gives_their_code(
    tmp_path: Path, asking: signal.Signals
) -> None:
    job = _job_with_two_ranks(tmp_path)
    job.send_signal(asking)
    assert job.wait(20) == PREEMPTED


@pytest.mark.parametrize(("code", "starts"), [(0, ["preflight", "main"]), (2, ["preflight"])])
def test_machines_are_checked_together_before_they_train(
    tmp_path: Path, code: int, starts: list[str]
) -> None:
    checked = f"echo $* >>{tmp_path}/starts; [[ $* != *--module* ]] || {{ exit {code}; }}"
    _write_stubs(tmp_path, f"echo PYTHONPATH=$PYTHONPATH >>{tmp_path}/starts; {checked}")
    node = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500", "RANKS": "1"}
    given = ["--recipe", "m3i.demo"]
    ended = run_script("jobs/local/pretrain.sh", *given, ENV=str(tmp_path), PREFLIGHT="1", **node)
    assert ended.returncode == code, ended.stderr
    found = (tmp_path / "starts").read_text().splitlines()
    ends = {"preflight": "--module pretrain.preflight", "main": f"{ROOT}/pretrain/main.py"}
    assert [line.partition("--node_rank 1 ")[2] for line in found[1::2]] == [
        f"{ends[start]} --recipe m3i.demo" for start in starts
    ]
    assert found[0].startswith(f"PYTHONPATH={ROOT}")  # where the launcher finds the module


@pytest.mark.parametrize(
    ("visible", "slots", "include"),
    [
        ("", 2, ""),
        ("0,1", 2, "--include node0:0,1@node1:0,1"),
        ("6,7,4", 8, "--include node0:6,7@node1:6,7"),  # the first two of those that the job was given
    ],
)
def test_each_of_several_machines_keeps_the_gpus_that_it_was_given(
    tmp_path: Path, visible: str, slots: int, include: str
) -> None:
    _write_stubs(tmp_path, "while [[ $1 != --hostfile ]]; do shift; done; cat $2; echo ${@:3}")
    (tmp_path / "bin" / "python").write_text("#!/usr/bin/env bash\necho 3 29500\n")
    given = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    node = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500", "RANKS": "2"}
    ended = run_script("jobs/local/pretrain.sh", "--recipe", "m3i.demo", ENV=str(tmp_path), **node, **given)
    hosts = [f"node{index} slots={slots}" for index in (0, 1)]
    command = f"--no_ssh --node_rank 1 {include}".strip()
    assert ended.stdout.splitlines() == [*hosts, f"{command} {ROOT}/pretrain/main.py --recipe m3i.demo"], (
        ended.stderr
    )


def test_gpus_that_the_launcher_cannot_choose_are_refused(tmp_path: Path) -> None:
    _write_stubs(tmp_path, "exit 0")
    (tmp_path / "bin" / "python").write_text("#!/usr/bin/env bash\necho 1 29500\n")
    node = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    ended = run_script(
        "jobs/local/pretrain.sh", "--recipe", "a", ENV=str(tmp_path), CUDA_VISIBLE_DEVICES="GPU-7f", **node
    )
    assert ended.returncode == 2 and "CUDA_VISIBLE_DEVICES=GPU-7f names GPUs otherwise" in ended.stderr


def test_a_local_job_whose_rank_is_killed_says_that_it_was_lost(tmp_path: Path) -> None:
    _write_stubs(tmp_path, "exit 247")  # as DeepSpeed's launcher tells of a rank that SIGKILL ended
    ended = run_script("jobs/local/pretrain.sh", "--recipe", "m3i.demo", ENV=str(tmp_path))
    assert ended.returncode == LOST
