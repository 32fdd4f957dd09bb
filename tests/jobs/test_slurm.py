"""Does a run come through a real Slurm queue of two nodes, which takes it off them twice, as it does on one machine?

The scripts of jobs/slurm as they are, on the embedded scenes. Nothing is installed here; `.ci/run` does that.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.exits import FINISHED
from tests.engine.launch import environment, run_ranks
from tests.jobs.slurm_cluster import Cluster, two_nodes, why_not
from tests.paths import ROOT

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

SECONDS = 600.0  # of a busy machine for any one thing that is waited for; a quiet one needs 20
REQUEUED_AFTER, DOWN_AFTER, STEPS = 3, 7, 11  # steps
RUN = f"--batch 4 --steps {STEPS} --save_every 3 --log_every 1 --optim.warmup 1 --backbone.drop_path 0.5".split()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with two_nodes(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def _until(what: str, holds: Callable[[], bool], cluster: Cluster, out: Path | None = None) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, (
            f"waited in vain until {what}\n{cluster.tell('squeue')}\n{cluster.logs()}\n{_logs(out) if out else ''}"
        )
        time.sleep(0.1)


def _curve(out: Path) -> list[dict[str, Any]]:
    """What the log says of the mathematics of every step."""
    kept = ("step", "nats", "lambda", "grad_norm", "lr", "momentum")
    log = out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    return [{key: json.loads(line)[key] for key in kept} for line in lines if line.endswith("\n")]


def _logs(out: Path) -> str:
    files = [path for path in sorted((out / "logs").rglob("*")) if path.is_file()]
    return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-2000:]}" for path in files)


@pytest.fixture(scope="module")
def submitted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The chain of jobs from the data to the export, disturbed twice while it trains, and a run beside it."""
    folder = tmp_path_factory.mktemp("run")
    data, out = folder / "scenes", folder / "out"
    cluster.environment |= environment(
        BUILD_SCENES=f"scenes --count 48 --size 64 --shard-size 21 --workers 1 --out {data}",
        TASKS="2",
        OPTIONS_PREPARE="--cpus-per-task=1",
        NODES="2",
        RANKS="1",
        DATA_LABELLED=f"{data}/train",
        DATA_CAPTIONED=f"{data}/train",
        OUT=str(out),
        ENV=sys.prefix,
        RECIPE="m3i.demo",
        EVALUATE_DATA=str(data),
        EVALUATE_ARGUMENTS="--probes knn --steps last",
        SHM_GIB="0",
        PREFLIGHT="0",  # test_hosts.py passes through it, and six starts more would take a minute
        GLOO_SOCKET_IFNAME="lo",
    )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        cluster.environment.pop(name, None)  # the job finds its own
    told = cluster.tell(str(ROOT / "jobs/slurm/submit.sh"), *RUN)
    jobs = dict(re.findall(r"^(\S+) +job (\d+)", told, re.MULTILINE))
    job = jobs["pretrain"]

    def requeue() -> None:
        cluster.tell("scontrol", "requeue", job)

    def lose_node() -> None:
        cluster.tell("scontrol", "update", "nodename=n2", "state=down", "reason=drill")

    states: dict[str, dict[str, str]] = {}

    def all_are_over() -> bool:
        for name in jobs.keys() - states.keys():  # Slurm forgets a job five minutes after its end
            found = cluster.job(jobs[name])
            if found["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"):
                states[name] = found
        return states.keys() == jobs.keys()

    steps = []
    for restart, (after, disturb) in enumerate(((REQUEUED_AFTER, requeue), (DOWN_AFTER, lose_node)), start=1):
        _until(f"step {after}", lambda after=after: all_are_over() or len(_curve(out)) >= after, cluster)
        assert not states.keys() & {"pretrain"}, _logs(out)
        disturb()
        _until("it waits", lambda n=restart: cluster.job(job)["Restarts"] == str(n), cluster)
        _until("it waits", lambda: cluster.job(job)["JobState"] == "PENDING", cluster)
        _until("its processes are gone", lambda: not cluster.has_steps(), cluster)
        steps.append(len(_curve(out)))
        if disturb is lose_node:  # it may be back already, since its slurmd lives
            cluster.tell("scontrol", "update", "nodename=n2", "state=resume", check=False)
        # Slurm lets a requeued job wait for two minutes, until what it sent to the nodes has expired.
        cluster.tell("scontrol", "update", f"jobid={job}", "starttime=now")
    _until("all is done", all_are_over, cluster, out)

    alone = folder / "alone"
    sources = [f"labelled={data}/train", f"captioned={data}/train"]
    command = [str(ROOT / "pretrain/main.py"), "--recipe", "m3i.demo", "--data", *sources, *RUN]
    codes = run_ranks([*command, "--out", str(alone)], folder / "alone.txt", world=2)
    assert codes == [FINISHED] * 2, (folder / "alone.txt").read_text()
    return {
        "states": states,
        "job": job,
        "steps": steps,
        "out": out,
        "alone": alone,
        "data": data,
        "told": told,
    }


def test_every_job_of_the_chain_completes(submitted: dict[str, Any]) -> None:
    found = {name: (job["JobState"], job["ExitCode"]) for name, job in submitted["states"].items()}
    names = ("prepare-scenes", "check-scenes", "pretrain", "evaluate", "export")
    assert found == dict.fromkeys(names, ("COMPLETED", "0:0")), _logs(submitted["out"])


def test_the_array_builds_what_the_check_finds_whole(submitted: dict[str, Any]) -> None:
    logs, data = submitted["out"] / "logs", submitted["data"]
    manifest = json.loads((data / "train" / "manifest.json").read_text())
    assert manifest["num_samples"] == 42 and len(manifest["shards"]) == 2
    tasks = "".join(path.read_text() for path in logs.glob("prepare-scenes-*.txt"))
    assert (
        f"{data}/train: part 1/2 has its 1 shards" in tasks
        and f"{data}/train: part 2/2 has its 1 shards" in tasks
    )
    assert next(logs.glob("check-scenes-*.txt")).read_text().count("every byte is as built") == 2


def test_a_requeue_and_a_lost_node_change_nothing(submitted: dict[str, Any]) -> None:
    out, steps = submitted["out"], submitted["steps"]
    assert submitted["states"]["pretrain"]["Restarts"] == "2"
    assert REQUEUED_AFTER <= steps[0] < DOWN_AFTER <= steps[1] < STEPS, "it was not disturbed in the middle"
    starts = sorted((out / "logs").glob(f"{submitted['job']}.*/*_rank0.log"))
    assert [start.parent.suffix for start in starts] == [".0", ".1", ".2"]
    assert "from the beginning" in starts[0].read_text()
    for start in starts[1:]:
        assert f"from {out}/checkpoints/step_" in start.read_text()
    assert _curve(out) == _curve(submitted["alone"])
    assert [line["step"] for line in _curve(out)] == list(range(1, STEPS + 1))


def test_both_nodes_say_how_they_ended_and_the_ranks_have_files(submitted: dict[str, Any]) -> None:
    last = submitted["out"] / "logs" / f"{submitted['job']}.2"
    for node in (0, 1):
        assert (
            f"node {node} (n{node + 1}) ended with code 0"
            in (last / f"node_{node}-n{node + 1}.txt").read_text()
        )
        assert len(list(last.glob(f"*_rank{node}.log"))) == 1
    batch = (submitted["out"] / "logs" / f"pretrain-{submitted['job']}.txt").read_text()
    ports = re.findall(r"2 nodes \(n\[1-2\]\), meeting at 127\.0\.0\.1:(\d+),", batch)
    assert len(set(ports)) == 3, batch
    assert f"ended with code 0 after step {STEPS}" in batch


def test_the_run_is_evaluated_and_exported(submitted: dict[str, Any]) -> None:
    out = submitted["out"]
    assert (out / "evaluation.json").is_file()
    assert "kNN" in next((out / "logs").glob("evaluate-*.txt")).read_text()
    assert "proven: towers.safetensors" in next((out / "logs").glob("export-*.txt")).read_text()
    assert (out / "export" / "safetensors" / "towers.safetensors").is_file()


def test_of_an_array_one_task_is_requeued_and_a_cancelled_one_is_not(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.environment |= environment(ENV=sys.prefix, M3I_ROOT=str(ROOT))
    build = f"scenes --count 20000 --size 64 --shard-size 100 --workers 1 --out {tmp_path / 'scenes'}".split()
    script = str(ROOT / "jobs/slurm/prepare.sh")
    options = ["--parsable", "--array=1-2", "--cpus-per-task=1", f"--output={tmp_path}/%a.txt"]
    array = cluster.tell("sbatch", *options, script, *build).strip()

    def tasks() -> dict[str, dict[str, str]]:
        told = cluster.tell("scontrol", "show", "job", "--oneliner", array).splitlines()
        return {(job := dict(re.findall(r"(\w+)=(\S*)", line)))["ArrayTaskId"]: job for line in told}

    def is_built(task: str) -> bool:
        return (output := tmp_path / f"{task}.txt").is_file() and "image/s" in output.read_text()

    _until("both tasks build", lambda: is_built("1") and is_built("2"), cluster)
    [asked] = [task for task, job in tasks().items() if job["JobId"] == array]  # whose number is that of all
    cluster.tell("scancel", "--signal=USR1", "--batch", f"{array}_{asked}")
    _until("it is requeued", lambda: tasks()[asked]["Restarts"] == "1", cluster)
    assert [job["Restarts"] for task, job in tasks().items() if task != asked] == ["0"]
    cluster.tell("scancel", array)
    _until("all are over", lambda: not cluster.has_steps(), cluster)
    _until(
        "all are cancelled", lambda: {job["JobState"] for job in tasks().values()} == {"CANCELLED"}, cluster
    )
    assert sum(int(job["Restarts"]) for job in tasks().values()) == 1


def test_srun_gives_no_code_that_the_scripts_could_trust(cluster: Cluster) -> None:
    """Why nodes write their codes to files: one that was killed hides what another one said."""
    script = "((SLURM_NODEID)) && kill -9 $$; exit 65"
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "bash", "-c", script]
    done = subprocess.run(srun, env=cluster.environment, capture_output=True, check=False, timeout=60)
    assert done.returncode == 128 + 9
