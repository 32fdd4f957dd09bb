"""Do the scripts for Slurm say what is missing, hear signals, combine the nodes' codes and know when to stop?

Slurm's commands are stand-ins here: srun starts its tasks on this machine, scontrol knows two nodes. The real ones
run in test_slurm.py.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.exits import DIVERGED, FAILED, FINISHED, LOST, MISTAKE, PREEMPTED
from tests.jobs.stubs import write_program
from tests.paths import ROOT

KILLED = 128 + signal.SIGKILL
# Tasks in a process group each, which SIGUSR1 reaches whole, as Slurm does it; the highest code, as srun has it.
SRUN = """echo "$@" >>"$STUBS/srun"
while [[ $1 == -* ]]; do case $1 in --nodes=*) nodes=${1#--nodes=} ;; esac; shift; done
set -m
for ((node = 0; node < nodes; node++)); do
  SLURM_STEP_NUM_NODES=$nodes SLURM_NODEID=$node SLURMD_NODENAME=n$((node + 1)) "$@" &
  tasks+=($!)
done
pass_on() { local task; for task in "${tasks[@]}"; do kill -s USR1 -- "-$task"; done; }
trap pass_on USR1
highest=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task"; done
  code=0; wait "$task" || code=$?
  ((code <= highest)) || highest=$code
done
exit "$highest"
"""
SCONTROL = """case "$1 $2" in
  "show hostnames") printf '%s\\n' n1 n2 ;;
  "getaddrs n1") [[ -z ${ADDRESS:-} ]] || echo "n1: $ADDRESS" ;;
  "show node") echo "   NodeAddr=10.0.0.7 NodeHostName=n1 Version=22.05.8" ;;
  "show job") echo "JobId=7 ArrayTaskId=3 JobState=${STATE:-RUNNING} Reason=None" ;;
  requeue*) echo "$2" >>"$STUBS/requeued" ;;
esac
"""
SBATCH = """echo "$@" >>"$STUBS/sbatch"
[[ "$*" != *"${REFUSED:-none}"* ]] || { echo "sbatch: error: Invalid partition" >&2; exit 1; }
wc -l <"$STUBS/sbatch"
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder with stand-ins in bin/, where they also keep what they were told, and an environment of that name."""
    texts = {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "scancel": 'echo "$@" >"$STUBS/scancel"'}
    for name, text in texts.items():
        write_program(tmp_path / "bin" / name, text)
    write_program(tmp_path / "bin" / "python", 'echo "$@" >>"$STUBS/python"')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").touch()
    return tmp_path


def variables(stubs: Path, **more: str) -> dict[str, str]:
    """Of a job of two nodes, and nothing else but PATH and HOME."""
    own = {
        "PATH": f"{stubs}/bin:{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", "/"),
        "STUBS": str(stubs),
        "M3I_ROOT": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "OUT": str(stubs / "out"),
        "ENV": str(stubs),
        "DATA_LABELLED": str(stubs / "data"),
        "SHM_GIB": "0",
    }
    return {name: value for name, value in (own | more).items() if value}


def run(stubs: Path, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A script of jobs/slurm; an empty variable is one that is not set."""
    return subprocess.run(
        [str(ROOT / "jobs" / "slurm" / script), *arguments],
        env=variables(stubs, **more),
        cwd=stubs,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def said(stubs: Path, command: str) -> list[str]:
    """The command lines that a stand-in was given."""
    path = stubs / command
    return path.read_text().splitlines() if path.is_file() else []


def nodes_that_end_with(stubs: Path, *codes: int) -> str:
    """A copy of the job scripts whose nodes end so, without ranks; KILLED: all of the node's processes are."""
    root = stubs / "repository"
    shutil.copytree(ROOT / "jobs", root / "jobs", dirs_exist_ok=True)
    shutil.copytree(ROOT / "ds_configs", root / "ds_configs", dirs_exist_ok=True)
    is_counted = "[[ $M3I_STARTS_COUNTED == 1 ]] || exit 9"
    ends = f"codes=({' '.join(map(str, codes))}); code=${{codes[$NODE_RANK]}}"
    kill = f"((code != {KILLED})) || kill -9 $PPID $$"
    write_program(root / "jobs/single_node/pretrain.sh", f"{is_counted}\n{ends}\n{kill}\nexit $code")
    return str(root)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((FINISHED, FINISHED), FINISHED),
        ((PREEMPTED, PREEMPTED), PREEMPTED),
        ((FINISHED, PREEMPTED), PREEMPTED),
        ((PREEMPTED, LOST), LOST),
        ((FINISHED, KILLED), LOST),
        ((KILLED, KILLED), LOST),
        ((LOST, FAILED), FAILED),
        ((MISTAKE, KILLED), MISTAKE),
        ((DIVERGED, LOST), DIVERGED),
        ((FAILED, DIVERGED), DIVERGED),
        ((127, LOST), LOST),
    ],
)
def test_the_nodes_codes_become_one_and_what_can_go_on_goes_into_the_queue(
    stubs: Path, codes: tuple[int, int], expected: int
) -> None:
    ended = run(stubs, "pretrain.sh", M3I_ROOT=nodes_that_end_with(stubs, *codes))
    assert ended.returncode == expected, ended.stderr
    assert said(stubs, "requeued") == (["7"] if expected in (PREEMPTED, LOST) else [])
    logs = stubs / "out" / "logs" / "7.0"
    assert (
        f"node 0 (n1) ended with code {codes[0]}" in (logs / "node_0-n1.txt").read_text()
        or codes[0] == KILLED
    )
    if expected in (FAILED, MISTAKE, DIVERGED):
        node = codes.index(expected)
        assert f"[slurm] node {node}: [slurm] node {node} (n{node + 1}) ended with code" in ended.stderr
        assert f"would end so again: see {logs}" in ended.stderr


@pytest.mark.parametrize(
    ("state", "requeued"),
    [
        ("RUNNING", ["7"]),
        ("COMPLETING", []),  # cancelled, or requeued by somebody else
        ("?", ["7"]),  # the controller did not answer
    ],
)
def test_a_job_that_no_longer_runs_does_not_put_itself_into_the_queue(
    stubs: Path, state: str, requeued: list[str]
) -> None:
    run(stubs, "pretrain.sh", M3I_ROOT=nodes_that_end_with(stubs, LOST, LOST), STATE=state)
    assert said(stubs, "requeued") == requeued


def test_restarts_in_vain_come_to_an_end_that_is_told(stubs: Path) -> None:
    root = nodes_that_end_with(stubs, LOST, LOST)
    sign = stubs / "out" / "ranks" / "rank_00000.json"
    sign.parent.mkdir(parents=True)

    def start(step: int) -> tuple[int, str]:
        sign.write_text(f'{{"rank": 0, "host": "a", "entered": 9, "step": {step}, "doing": "steps"}}')
        return len(said(stubs, "requeued")), run(stubs, "pretrain.sh", M3I_ROOT=root, RESTARTS="2").stderr

    for step, num_requeued in ((10, 0), (10, 1), (20, 2), (15, 3)):
        assert start(step) == (num_requeued, "")  # of those before this one
    assert "3 starts came to no step beyond 20: not requeued" in start(20)[1]
    assert len(said(stubs, "requeued")) == 4
    assert start(20) == (4, "") and len(said(stubs, "requeued")) == 5, (
        "who starts it again has all restarts again"
    )


@pytest.mark.parametrize(
    ("script", "without", "named"),
    [
        ("pretrain.sh", {"OUT": ""}, "OUT: is not set"),
        ("pretrain.sh", {"ENV": ""}, "ENV: is not set"),
        ("pretrain.sh", {"ENV": "/nowhere"}, "ENV=/nowhere holds no bin/python"),
        ("pretrain.sh", {"DATA_LABELLED": ""}, "no DATA_<NAME> is set"),
        ("pretrain.sh", {"DATA_LABELLED": "/nowhere"}, "DATA_LABELLED=/nowhere holds no manifest.json"),
        ("pretrain.sh", {"DS_CONFIG": "no.json"}, "DS_CONFIG=no.json is no file"),
        ("pretrain.sh", {"RESTARTS": "some"}, "RESTARTS=some is no number"),
        (
            "pretrain.sh",
            {"CONTAINER": "docker"},
            "CONTAINER=docker is unknown: choose from none, apptainer, pyxis",
        ),
        ("pretrain.sh", {"CONTAINER": "pyxis"}, "IMAGE: is not set"),
        ("pretrain.sh", {"CONTAINER": "pyxis", "IMAGE": "/no.sqsh"}, "IMAGE=/no.sqsh is not there"),
        ("pretrain.sh", {"M3I_ROOT": "/nowhere"}, "M3I_ROOT=/nowhere is not the repository"),
        ("pretrain.sh", {"SLURM_JOB_NUM_NODES": ""}, "start this script by sbatch"),
        ("node.sh", {}, "this script is started by srun"),
        ("evaluate.sh", {}, "EVALUATE_DATA: is not set"),
        ("evaluate.sh", {"EVALUATE_DATA": "/nowhere"}, "EVALUATE_DATA=/nowhere has no train/"),
        ("export.sh", {"OUT": ""}, "OUT: is not set"),
        ("prepare.sh", {}, "no --out: give the arguments of"),
        ("submit.sh", {}, "NODES: is not set"),
        ("submit.sh", {"NODES": "two"}, "NODES=two is no number"),
        ("submit.sh", {"NODES": "0"}, "NODES=0 is no number from 1"),
        (
            "submit.sh",
            {
                "NODES": "1",
                "BUILD_SCENES": "scenes --out /a/b",
                "DATA_BUILT": "/a/b/train",
                "DATA_ODD": "/a/bc",
            },
            "DATA_ODD=/a/bc holds no manifest.json",
        ),
        ("submit.sh", {"NODES": "1", "EXPORT_TO": "timm nonsense"}, "has nonsense, which is no format"),
        (
            "submit.sh",
            {"NODES": "2", "BUILD_A": "scenes --output x"},
            "BUILD_A=scenes --output x names no --out",
        ),
        ("submit.sh", {"NODES": "2", "EVALUATE_DATA": "/nowhere"}, "EVALUATE_DATA=/nowhere has no train/"),
    ],
)
def test_what_is_missing_is_named_before_anything_starts(
    stubs: Path, script: str, without: dict[str, str], named: str
) -> None:
    refused = run(stubs, script, **without)
    assert refused.returncode in (1, 2)  # after which no job goes on
    assert named in refused.stderr
    assert not said(stubs, "srun") and not said(stubs, "sbatch")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("10.0.0.1:6818", "10.0.0.1"), ("[fd00::1]:6818", "fd00::1"), ("", "10.0.0.7")],
)
def test_the_nodes_meet_at_an_address_and_a_port_of_their_own(
    stubs: Path, address: str, expected: str
) -> None:
    root = nodes_that_end_with(stubs, FINISHED, FINISHED)
    ports = []
    for restart in ("0", "1"):
        told = run(stubs, "pretrain.sh", M3I_ROOT=root, ADDRESS=address, SLURM_RESTART_COUNT=restart).stdout
        found = re.search(rf"2 nodes \(n\[1-2\]\), meeting at {re.escape(expected)}:(\d+), logs in ", told)
        assert found, told
        ports.append(int(found[1]))
    assert ports[0] != ports[1] and all(20000 <= port < 30000 for port in ports)


# A rank: the launcher lets SIGUSR1 pass, so bash could not hear it.
RANK = """import os, pathlib, signal, sys, time
def save(*_):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    pathlib.Path(sys.argv[1] + "_asked").touch()
    time.sleep(0.5)
    os._exit(75)
signal.signal(signal.SIGUSR1, save)
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def wait_for(process: subprocess.Popen[bytes], *paths: Path) -> None:
    while not all(path.is_file() for path in paths):
        assert process.poll() is None, "it ended before it began"
        time.sleep(0.02)


def test_a_job_that_is_asked_to_stop_asks_the_ranks_of_all_nodes(stubs: Path) -> None:
    """From Slurm's signal to the batch script through srun, node.sh and the launcher, and back; it comes twice."""
    (stubs / "rank.py").write_text(RANK)
    rank = f"{sys.executable} $STUBS/rank.py $STUBS/rank_$NODE_RANK"
    write_program(
        stubs / "bin" / "deepspeed", f"({rank} & wait $!) & wait $!"
    )  # as its launcher stands between
    write_program(stubs / "bin" / "python", "echo 0 29500")  # GPUs and a free port
    job = subprocess.Popen(
        [str(ROOT / "jobs/slurm/pretrain.sh"), "--steps", "3"], env=variables(stubs, RANKS="1", PREFLIGHT="0")
    )
    wait_for(job, stubs / "rank_0", stubs / "rank_1")
    job.send_signal(signal.SIGUSR1)
    wait_for(job, stubs / "rank_0_asked", stubs / "rank_1_asked")
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == PREEMPTED
    assert said(stubs, "requeued") == ["7"]


def test_a_build_that_is_asked_to_stop_is_told_and_its_workers_are_not(stubs: Path) -> None:
    # 143 is what `data_prep` ends with; a worker that Slurm's signal reached would leave no file.
    worker = "(sleep 0.3; touch $STUBS/worker) & worker=$!"
    build = (
        f"trap 'wait $worker; exit 143' TERM\n{worker}\ntouch $STUBS/begun\nwhile true; do sleep 0.05; done"
    )
    write_program(stubs / "bin" / "python", build)
    script = [str(ROOT / "jobs/slurm/prepare.sh"), "scenes", "--out", "data"]
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}  # of which one task has the number of all
    for restart, requeued in (("0", ["7_3"]), ("3", ["7_3"])):
        given = variables(stubs, SLURM_RESTART_COUNT=restart, PREPARE_RESTARTS="3", **array)
        job = subprocess.Popen(script, env=given, cwd=stubs)
        wait_for(job, stubs / "begun")
        job.send_signal(signal.SIGUSR1)
        assert job.wait(30) == 128 + signal.SIGTERM
        assert (stubs / "worker").is_file()
        assert said(stubs, "requeued") == requeued
        (stubs / "begun").unlink()
        (stubs / "worker").unlink()


def test_a_data_set_is_built_by_an_array_and_checked_by_a_job_after_it(stubs: Path) -> None:
    arguments = ("scenes", "--count", "64", "--out=d")
    run(stubs, "prepare.sh", *arguments, SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="4")
    assert said(stubs, "python") == ["-m data_prep build scenes --count 64 --out=d --workers 4 --part slurm"]
    run(stubs, "prepare.sh", *arguments, "--workers", "1")
    assert said(stubs, "python")[1:] == [
        "-m data_prep build scenes --count 64 --out=d --workers 1",
        "-m data_prep check d",
    ]


def test_a_container_holds_the_repository_the_run_and_the_data(stubs: Path) -> None:
    out, data = stubs / "out", stubs / "data"
    write_program(stubs / "bin" / "apptainer", 'echo "$@" >"$STUBS/apptainer"')
    more = {"IMAGE": "docker://m3i", "MOUNTS": "/a /b:/c", "ENV": "", "EXPORT_TO": "timm"}
    assert run(stubs, "export.sh", CONTAINER="apptainer", **more).returncode == 0
    paths = f"{ROOT},{out},{data},/a,/b:/c"
    command = f"python -m pretrain.export {out} --to timm"
    assert said(stubs, "apptainer") == [f"exec --nv --bind {paths} docker://m3i {command}"]

    run(stubs, "export.sh", CONTAINER="pyxis", CONTAINER_OPTIONS="--no-container-mount-home", **more)
    options = said(stubs, "srun")[-1]
    paths = f"{ROOT}:{ROOT},{out}:{out},{data}:{data},/a:/a,/b:/c"
    assert f"--container-image=docker://m3i --container-mounts={paths} --no-container-mount-home" in options
    assert options.endswith(command)


CHAIN = {"NODES": "2", "GPUS": "8", "TASKS": "4", "BUILD_LABELLED": "scenes --count 64 --out d"}


def test_one_command_submits_the_chain(stubs: Path) -> None:
    more = {"EVALUATE_DATA": str(stubs / "d"), "OPTIONS_PRETRAIN": "--time=2-0", "DATA_LABELLED": "d/train"}
    shown = run(stubs, "submit.sh", "--dry-run", "--steps", "3", **CHAIN, **more)
    assert shown.returncode == 0 and not said(stubs, "sbatch")
    assert "--dependency=afterok:PREPARE-LABELLED" in shown.stdout and "--steps 3" in shown.stdout

    told = run(stubs, "submit.sh", "--steps", "3", **CHAIN, **more)
    assert told.returncode == 0, told.stderr
    logs = stubs / "out" / "logs"
    assert f"output {logs}/prepare-labelled-1_%a.txt" in told.stdout
    assert f"output {logs}/pretrain-3.txt" in told.stdout
    array, check, pretrain, evaluate, export = said(stubs, "sbatch")
    assert "--array=1-4" in array and array.endswith("/prepare.sh scenes --count 64 --out d")
    assert "afterok:1 " in check and "--array" not in check
    assert "afterok:2 " in pretrain and "--nodes=2 --gpus-per-node=8 --time=2-0" in pretrain
    assert pretrain.endswith("/pretrain.sh --steps 3")
    assert "afterok:3 " in evaluate and "--gpus-per-node=8" in evaluate
    assert "afterok:3 " in export and "--gpus" not in export
    assert all("--kill-on-invalid-dep=yes" in line for line in (check, pretrain, evaluate, export))


def test_a_refused_job_takes_back_those_before_it(stubs: Path) -> None:
    refused = run(stubs, "submit.sh", REFUSED="--nodes=2", **CHAIN)
    assert refused.returncode == 1
    assert (
        "Invalid partition" in refused.stderr and "cancels those submitted before it: 1 2" in refused.stderr
    )
    assert said(stubs, "scancel") == ["1 2"]
