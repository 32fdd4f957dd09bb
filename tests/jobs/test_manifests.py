"""Do the manifests for Kubernetes say what the scripts and the image need, and do the scripts what they say?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pretrain.exits import DIVERGED, FAILED, LOST, MISTAKE, PREEMPTED
from pretrain.watchdog import Watchdog
from tests.jobs.stubs import launched, run_script, write_launcher, write_program
from tests.paths import ROOT

FOLDER = ROOT / "jobs" / "kubernetes"
OLDEST = "1.31"  # successPolicy is on by default since; older ones would leave it out
MANIFESTS = [
    pytest.param(manifest, id=f"{path.name}-{manifest['metadata']['name']}")
    for path in sorted(FOLDER.glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
]
JOBS = [case for case in MANIFESTS if case.values[0]["kind"] == "Job"]
RUN: dict[str, str] = yaml.safe_load((FOLDER / "run.yaml").read_text())["data"]


def named(name: str, kind: str = "Job") -> dict[str, Any]:
    found = (case.values[0] for case in MANIFESTS)
    return next(each for each in found if each["metadata"]["name"] == name and each["kind"] == kind)


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def container(job: dict[str, Any]) -> dict[str, Any]:
    (one,) = pod(job)["containers"]
    return one


def environment(job: dict[str, Any], index: int) -> dict[str, str]:
    """What a container of the Job's pod `index` is given; numbers of the machine are 2."""
    fields = {
        "metadata.labels['batch.kubernetes.io/job-name']": job["metadata"]["name"],
        "spec.nodeName": "machine-1",
    }
    given = dict(RUN) | {"JOB_COMPLETION_INDEX": str(index)}
    for entry in container(job)["env"]:
        source = entry.get("valueFrom", {})
        field = source.get("fieldRef", {}).get("fieldPath")
        given[entry["name"]] = entry.get("value") or (fields[field] if field else "2")
    return given


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_fits_the_schema_and_has_no_unknown_field(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schema_would_find_a_misspelt_field() -> None:
    wrong = named("m3i-pretrain") | {"spec": named("m3i-pretrain")["spec"] | {"parallellism": 2}}
    with pytest.raises(kubernetes_validate.ValidationError, match="parallellism"):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


@pytest.mark.parametrize("job", JOBS)
def test_a_pod_runs_as_the_user_of_the_image_and_may_do_nothing_more(job: dict[str, Any]) -> None:
    user = re.search(r"--uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert user is not None
    allowed = pod(job)["securityContext"]
    assert allowed["runAsNonRoot"] and str(allowed["runAsUser"]) == str(allowed["fsGroup"]) == user[1]
    assert not container(job)["securityContext"]["allowPrivilegeEscalation"]
    assert container(job)["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("job", JOBS)
def test_what_a_job_names_is_there(job: dict[str, Any]) -> None:
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod(job)["volumes"][:2]}
    assert all(named(claim, "PersistentVolumeClaim") for claim in claims)
    mounted = {mount["name"] for mount in container(job)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod(job)["volumes"]}
    memory = next(volume for volume in pod(job)["volumes"] if volume["name"] == "shared-memory")
    assert memory["emptyDir"]["medium"] == "Memory"
    assert named(pod(job)["priorityClassName"], "PriorityClass")
    *start, script = [word for word in container(job)["command"] if not word.isalpha() or word == "tini"]
    assert start == ["tini", "-s", "--"] and "tini" in (ROOT / "Dockerfile").read_text()
    probes = [value["exec"]["command"][0] for key, value in container(job).items() if key.endswith("Probe")]
    assert all(os.access(ROOT / path, os.X_OK) for path in [script, *probes])
    for rule in job["spec"].get("podFailurePolicy", {}).get("rules", []):
        assert (
            rule.get("onExitCodes", {}).get("containerName", container(job)["name"]) == container(job)["name"]
        )


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (FAILED, "FailJob"),
        (MISTAKE, "FailJob"),
        (DIVERGED, "FailJob"),
        (PREEMPTED, "Ignore"),
        (LOST, "Ignore"),
        (137, None),  # counted, for backoffLimit
    ],
)
def test_what_becomes_of_a_pod_is_decided_by_its_exit_code(code: int, action: str | None) -> None:
    rules = named("m3i-pretrain")["spec"]["podFailurePolicy"]["rules"]
    found = [rule["action"] for rule in rules if code in rule.get("onExitCodes", {}).get("values", ())]
    assert found == ([action] if action else [])


def test_every_pod_of_the_job_is_a_machine_of_the_run() -> None:
    job, service = named("m3i-pretrain"), named("m3i-pretrain", "Service")
    spec = job["spec"]
    given = environment(job, 0)
    assert spec["completions"] == spec["parallelism"] == int(given["NODES"])
    assert spec["completionMode"] == "Indexed"
    assert pod(job)["subdomain"] == service["metadata"]["name"] == given["SERVICE"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": given["JOB_NAME"]}
    assert service["spec"]["ports"][0]["port"] == int(given["MASTER_PORT"])


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """A launcher that leaves its arguments, and how long the preflight waits; and names that are found."""
    write_launcher(tmp_path, f"echo $PREFLIGHT_CONNECT_SECONDS $M3I_STARTS_COUNTED >{tmp_path}/patience")
    write_program(tmp_path / "bin" / "getent", f'echo "$@" >{tmp_path}/asked')
    return {"ENV": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


@pytest.mark.parametrize("index", [0, 1])
def test_entry_starts_the_machine_that_its_number_says(
    index: int, cluster: dict[str, str], tmp_path: Path
) -> None:
    given = environment(named("m3i-pretrain"), index)
    out = {"OUT": str(tmp_path / "run"), "PREFLIGHT": "0"}
    ended = run_script("jobs/kubernetes/entry.sh", **given | cluster | out)
    assert ended.returncode == 0, ended.stderr
    address = "m3i-pretrain-0.m3i-pretrain"
    assert (tmp_path / "asked").read_text().split() == ["hosts", address]
    assert (tmp_path / "patience").read_text() == "1800 1\n"  # for machines that still fetch the image
    assert launched(tmp_path) == [
        *f"--quiet --master_addr {address} --master_port 29500 --hostfile HOSTFILE --no_ssh".split(),
        *f"--node_rank {index} {ROOT}/pretrain/main.py --recipe {RUN['RECIPE']} --data".split(),
        *RUN["DATA"].split(),
        *f"--out {tmp_path}/run --ds-config {RUN['DS_CONFIG']} {RUN['ARGUMENTS']}".split(),
    ]


@pytest.mark.parametrize(
    ("script", "wrong", "told"),
    [
        ("entry.sh", {"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX: is not set"),
        ("entry.sh", {"NODES": ""}, "NODES: is not set"),
        ("entry.sh", {"RECIPE": ""}, "RECIPE: is not set"),
        ("entry.sh", {"DATA": ""}, "DATA: is not set"),
        ("entry.sh", {"OUT": ""}, "OUT: is not set"),
        ("entry.sh", {"JOB_NAME": ""}, "JOB_NAME: is not set"),
        ("entry.sh", {"SERVICE": ""}, "SERVICE: is not set"),
        ("entry.sh", {"NODES": "two"}, "NODES=two is no number from 1"),
        ("entry.sh", {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX=2 and NODES=2: set completions"),
        ("entry.sh", {"WAIT_SECONDS": "long"}, "WAIT_SECONDS=long is no number from 0"),
        ("prepare.sh", {"PREPARE_OUT": ""}, "PREPARE_OUT: is not set"),
        ("prepare.sh", {"PREPARE_SOURCE": ""}, "PREPARE_SOURCE: is not set"),
        ("prepare.sh", {"PARTS": ""}, "PARTS: is not set"),
        ("prepare.sh", {"PARTS": "1"}, "JOB_COMPLETION_INDEX=1 and PARTS=1: set completions"),
        ("prepare.sh", {"WORKERS": "many"}, "WORKERS=many is no number from 1"),
        ("evaluate.sh", {"OUT": ""}, "OUT: is not set"),
        ("evaluate.sh", {"EVALUATE_DATA": ""}, "EVALUATE_DATA: is not set"),
        ("probe.sh", {"OUT": ""}, "OUT: is not set"),
    ],
)
def test_a_variable_that_is_missing_or_wrong_is_named(script: str, wrong: dict[str, str], told: str) -> None:
    job = {"prepare.sh": "m3i-prepare"}.get(script, "m3i-pretrain")
    given = environment(named(job), 1) | {"OUT": "/nowhere"} | wrong
    arguments = ["build"] if script == "prepare.sh" else []
    refused = run_script(f"jobs/kubernetes/{script}", *arguments, **given)
    assert refused.returncode in (1, 2)  # after which the Job fails
    assert told in refused.stderr


def test_entry_says_for_which_machine_it_has_waited(cluster: dict[str, str], tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "getent", "exit 2")
    given = environment(named("m3i-pretrain"), 1) | cluster | {"OUT": str(tmp_path), "WAIT_SECONDS": "1"}
    ended = run_script("jobs/kubernetes/entry.sh", **given)
    assert ended.returncode == LOST
    assert (
        "machine 1 has waited 1 s (WAIT_SECONDS) until m3i-pretrain-0.m3i-pretrain has an address"
        in ended.stderr
    )
    assert not (tmp_path / "arguments").exists()


def test_a_pod_that_is_started_again_waits_for_the_ranks_of_the_start_before(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    given = environment(named("m3i-pretrain"), 1) | cluster
    given |= {"OUT": str(tmp_path / "run"), "QUIET_SECONDS": "0.7", "WAIT_SECONDS": "1", "PREFLIGHT": "0"}
    with Watchdog(tmp_path / "run", rank=0, world=2, timeout=2.0) as lives:
        lives.at(3, "waits for rank 1", times=100)
        waited = run_script("jobs/kubernetes/entry.sh", **given)
        left = (tmp_path / "run/ranks/rank_00000.json").read_bytes()
    assert waited.returncode == LOST
    assert "until the ranks of the start before have ended" in waited.stderr
    assert not (tmp_path / "arguments").exists()
    (tmp_path / "run/ranks/rank_00000.json").write_bytes(left)  # as SIGKILL would have left it
    assert run_script("jobs/kubernetes/entry.sh", **given).returncode == 0
    assert (tmp_path / "arguments").exists()


RANK = """import pathlib, sys, time
sys.path.insert(0, {root!r})
from pretrain.watchdog import Watchdog
out = pathlib.Path({out!r})
while not (out / "meet").exists():
    time.sleep(0.02)
with Watchdog(out, rank=5, world=8, timeout=1.0) as watchdog:
    for step in (7, 8):
        watchdog.at(step, "waits for a batch", times=100)
        while not (out / f"after {{step}}").exists():
            time.sleep(0.02)
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A rank that meets the others, begins at step 7 and makes step 8 when files say so."""
    script = tmp_path / "pretrain" / "main.py"
    script.parent.mkdir()
    script.write_text(RANK.format(root=str(ROOT), out=str(tmp_path)))
    given = os.environ | {"RANK": "5", "OUT": str(tmp_path)}
    with subprocess.Popen([sys.executable, str(script), "--local_rank=0"], env=given) as process:
        yield process
        process.kill()


def test_probes_tell_how_far_a_rank_is(rank: subprocess.Popen[bytes], tmp_path: Path) -> None:
    def probe(asked: str) -> int:
        given = {"OUT": str(tmp_path), "PROBE_FOLDER": str(tmp_path)}
        return run_script("jobs/kubernetes/probe.sh", asked, **given).returncode

    def becomes(asked: str, code: int) -> None:
        until = time.monotonic() + 60
        while probe(asked) != code:
            assert time.monotonic() < until and rank.poll() is None, f"{asked} does not become {code}"

    assert probe("begun") == probe("steps") == probe("lives") == 1
    (tmp_path / "meet").touch()
    becomes("begun", 0)
    assert probe("steps") == 1
    (tmp_path / "after 7").touch()
    becomes("steps", 0)
    becomes("lives", 0)
    rank.send_signal(19)  # SIGSTOP
    probe("lives")
    assert probe("lives") == probe("lives") == 1


def test_a_share_of_the_data_is_that_of_the_pod(tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "python", f'printf "%s\\n" "$@" >{tmp_path}/arguments')
    job = named("m3i-prepare")
    given = environment(job, 3) | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    assert int(given["PARTS"]) == job["spec"]["completions"]
    assert run_script("jobs/kubernetes/prepare.sh", "build", **given).returncode == 0
    assert (tmp_path / "arguments").read_text().split() == [
        *f"-m data_prep build {RUN['PREPARE_SOURCE']} --out {RUN['PREPARE_OUT']}".split(),
        *f"{RUN['PREPARE_ARGUMENTS']} --part 4/16 --workers 2".split(),
    ]


def test_a_job_whose_starts_come_to_no_step_fails_and_counts_anew_afterwards(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    given = environment(named("m3i-pretrain"), 0) | cluster | {"OUT": str(tmp_path / "run"), "PREFLIGHT": "0"}
    given |= {"RESTARTS": "2", "QUIET_SECONDS": "0"}
    sign = tmp_path / "run/ranks/rank_00000.json"
    sign.parent.mkdir(parents=True)
    codes = []
    for step in (4, 4, 9, 9, 9, 9):
        sign.write_text(f'{{"step": {step}, "ended": true}}')
        ended = run_script("jobs/kubernetes/entry.sh", **given)
        codes.append(ended.returncode)
        assert ended.returncode == 0 or "3 starts came to no step beyond 9" in ended.stderr
    assert codes == [0, 0, 0, 0, FAILED, 0]
