"""Do hosts and pods train together as two local ranks do, and is one that does not answer named?"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main as data_prep
from pretrain.exits import FAILED, PREEMPTED
from tests.engine.launch import run_ranks
from tests.jobs.two_hosts import NAMES, TwoHosts, two_hosts, unusable
from tests.paths import ROOT

SCRIPT = "jobs/hostfile/pretrain.sh"
STEPS = 14
PREFLIGHT = {"PREFLIGHT": "1", "PREFLIGHT_ONLY": "ranks,arguments,reach,links"}
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if reason := unusable():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts"), {NAMES[0]: ["m3i-pretrain-0.m3i-pretrain"]}) as both:
        yield both


def test_a_host_that_does_not_answer_is_named_in_bounded_time(hosts: TwoHosts, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"{NAMES[0]} slots=1\n10.213.7.9 slots=1\n")
    environment = hosts.environment(
        HOSTFILE=str(tmp_path / "hosts"), ENV=str(Path(sys.executable).parent.parent)
    )
    command = hosts.inside(NAMES[0], str(ROOT / SCRIPT), "--recipe", "m3i.demo")
    refused = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert refused.returncode == FAILED
    assert "10.213.7.9 (code 255) cannot be used" in refused.stderr


def _curve(out: Path) -> list[dict[str, Any]]:
    kept = ("step", "nats", "lambda", "grad_norm")
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{key: record[key] for key in kept} for record in records]


def _arguments(scenes: Path, out: Path) -> list[str]:
    small = f"--batch 4 --steps {STEPS} --save_every 100 --log_every 1 --optim.warmup 1 --timeout 120"
    data = [f"labelled={scenes}", f"captioned={scenes}"]
    return ["--recipe", "m3i.demo", "--out", str(out), "--data", *data, *small.split()]


def test_two_hosts_train_as_two_local_ranks_do(hosts: TwoHosts, tmp_path: Path) -> None:
    """By a hostfile until they are asked to stop, then as two pods to the end."""
    env = {"ENV": str(Path(sys.executable).parent.parent)} | CPU
    small = ["--count", "64", "--size", "64", "--workers", "1"]
    assert data_prep(["build", "scenes", "--out", str(tmp_path / "scenes"), *small]) == 0
    scenes = tmp_path / "scenes" / "train"

    stopped = _by_hostfile(hosts, _arguments(scenes, tmp_path / "hosts"), env, tmp_path)
    told = (tmp_path / "hostfile.txt").read_text()
    assert stopped == PREEMPTED and "preflight of 2 ranks on 2 nodes: fit for training" in told, told
    assert "links" in told and "all_reduce" not in told
    assert 2 <= len(_curve(tmp_path / "hosts")) < STEPS
    codes = _as_pods(hosts, scenes, tmp_path / "hosts", env, tmp_path)
    assert codes == [0, 0], [(tmp_path / f"pod{index}.txt").read_text() for index in (0, 1)]

    command = [str(ROOT / "pretrain" / "main.py"), *_arguments(scenes, tmp_path / "local")]
    codes = run_ranks(command, tmp_path / "local.txt", world=2)
    assert codes == [0, 0], (tmp_path / "local.txt").read_text()
    assert _curve(tmp_path / "hosts") == _curve(tmp_path / "local")


def _by_hostfile(hosts: TwoHosts, arguments: list[str], env: dict[str, str], folder: Path) -> int:
    """The exit code, after SIGTERM at the second step."""
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    log = folder / "hosts" / "log.jsonl"
    given = hosts.environment(
        HOSTFILE=str(folder / "hostfile"), GLOO_SOCKET_IFNAME="eth0", **PREFLIGHT, **env
    )
    command = hosts.inside(NAMES[0], str(ROOT / SCRIPT), *arguments)
    with (folder / "hostfile.txt").open("w") as output:
        job = subprocess.Popen(command, env=given, stdout=output, stderr=output)
        while job.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= 2):
            time.sleep(0.05)
        job.terminate()
        return job.wait(300)


def _as_pods(hosts: TwoHosts, scenes: Path, out: Path, env: dict[str, str], folder: Path) -> list[int]:
    """Exit codes of entry.sh on both hosts."""
    (
        _,
        recipe,
        _,
        _,
        _,
        *sources,
    ) = _arguments(scenes, out)
    given = {
        "JOB_NAME": "m3i-pretrain",
        "SERVICE": "m3i-pretrain",
        "NODES": "2",
        "RANKS": "1",
        "RECIPE": recipe,
        "PREFLIGHT": "0",  # the start by a hostfile passes through it; here it would start six processes more
    }
    given |= {"DATA": " ".join(sources[:2]), "ARGUMENTS": " ".join(sources[2:]), "OUT": str(out)} | env
    pods = []
    for index, name in enumerate(NAMES):
        with (folder / f"pod{index}.txt").open("w") as output:
            pods.append(
                subprocess.Popen(
                    hosts.inside(name, str(ROOT / "jobs/kubernetes/entry.sh")),
                    env=hosts.environment(JOB_COMPLETION_INDEX=str(index), **given),
                    stdout=output,
                    stderr=output,
                )
            )
    return [pod.wait(300) for pod in pods]
