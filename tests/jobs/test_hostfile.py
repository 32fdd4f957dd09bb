"""Does a run on the hosts of a hostfile start, stop and end as its script says? ssh and DeepSpeed are stubs here."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.exits import DIVERGED, FAILED, INTERRUPTED, LOST, MISTAKE, PREEMPTED
from tests.jobs.stubs import launched, run_script, write_program
from tests.paths import ROOT

SCRIPT = "jobs/hostfile/pretrain.sh"
SECRET = 'gr"een $HOME tea'
# Hosts are this machine: what `ssh HOST COMMAND` would do there is done here.
SSH = 'while [[ $1 != -- ]]; do shift; done; [[ $2 == dark* ]] && exit 255; exec bash -c "$3"'


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """A hostfile of two hosts, and an environment whose launcher does what FOLDER/launch says."""
    (tmp_path / "hosts").write_text("# ours\nnode1 slots=2\nnode2 slots=2\n")
    write_program(
        tmp_path / "bin" / "deepspeed", f'printf "%s\\n" "$@" >{tmp_path}/arguments\n. {tmp_path}/launch'
    )
    write_program(tmp_path / "bin" / "python", "echo free_port 29555")
    write_program(tmp_path / "bin" / "ssh", SSH)
    write_program(tmp_path / "bin" / "pdsh", "exit 1")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    names = {"HOSTFILE": str(tmp_path / "hosts"), "ENV": str(tmp_path), "PATH": path, "SHELL": "/bin/bash"}
    return names | {"MASTER_ADDR": "10.0.0.1"}


@pytest.mark.parametrize(
    ("hosts", "wrong", "told"),
    [
        (None, {"HOSTFILE": ""}, "HOSTFILE: is not set"),
        (None, {"HOSTFILE": "/nowhere"}, "HOSTFILE=/nowhere is no file"),
        ("node1\n", {}, 'has the line "node1": write NAME slots=RANKS'),
        ("node1 slots=0\n", {}, 'has the line "node1 slots=0": write NAME slots=RANKS'),
        ("node1 slots=1\nnode1 slots=1", {}, "names node1 twice"),
        ("# none\n", {}, "names no host"),
        (None, {"LAUNCHER": "ssh"}, "LAUNCHER=ssh is unknown: choose pdsh or openmpi"),
        (None, {"SSH_PORT": "here"}, "SSH_PORT=here is no port"),
        (None, {"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        (None, {"ENV": "/nowhere"}, "ENV=/nowhere holds no bin/deepspeed: run `make venv"),
    ],
)
def test_what_is_missing_or_wrong_is_named_before_any_host_is_asked(
    hosts: str | None, wrong: dict[str, str], told: str, place: dict[str, str], tmp_path: Path
) -> None:
    write_program(tmp_path / "bin" / "ssh", f"touch {tmp_path}/asked")
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
    refused = run_script(SCRIPT, "--recipe", "m3i.demo", **place | wrong)
    assert refused.returncode in (FAILED, MISTAKE)
    assert told in refused.stderr
    assert not (tmp_path / "asked").exists()


def test_hosts_that_cannot_be_used_are_all_named(place: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=2\ndark1 slots=2\ndark2 slots=2\n")
    refused = run_script(SCRIPT, "--recipe", "m3i.demo", **place)
    assert refused.returncode == FAILED
    assert "dark1 (code 255) dark2 (code 255) cannot be used" in refused.stderr
    assert "node1" not in refused.stderr.replace("`node1", "")
    assert not (tmp_path / "arguments").exists()


def test_deepspeed_gets_the_hostfile_and_ranks_what_they_need(place: dict[str, str], tmp_path: Path) -> None:
    keep = f"""settings=$(sed --quiet '/^--venv_script$/{{n;p}}' {tmp_path}/arguments)
stat --format=%a "$settings" >{tmp_path}/mode
. "$settings"; printf '%s\\n' "$NCCL_DEBUG" "$AWS_SECRET_ACCESS_KEY" "$OURS" "${{NOT_OURS:-}}" >{tmp_path}/given"""
    (tmp_path / "launch").write_text(f"( unset NCCL_DEBUG AWS_SECRET_ACCESS_KEY OURS; {keep} )")
    more = {"NCCL_DEBUG": "WARN", "AWS_SECRET_ACCESS_KEY": SECRET, "OURS": "1", "FORWARD": "OURS"}
    ended = run_script(SCRIPT, "--recipe", "m3i.demo", "a $b 5% (c)", "*", **place | more)
    assert ended.returncode == 0, ended.stderr
    words = launched(tmp_path)
    settings = words[words.index("--venv_script") + 1]
    assert words == [
        *[
            "--quiet",
            "--hostfile",
            "HOSTFILE",
            "--launcher",
            "pdsh",
            "--master_addr",
            "10.0.0.1",
            "--master_port",
            "29555",
        ],
        *f"--force_multi --no_ssh_check --venv_script {settings} {ROOT}/pretrain/main.py".split(),
        *("--recipe", "m3i.demo", "a \\$b 5%% (c)", "\\*"),  # as a remote shell, pdsh and DeepSpeed want them
    ]
    assert (tmp_path / "given").read_text().splitlines() == ["WARN", SECRET, "1", ""]
    assert int((tmp_path / "mode").read_text(), 8) == stat.S_IRUSR | stat.S_IWUSR
    assert not Path(settings).exists()


def test_mpirun_gets_the_hostfile_and_ranks_the_names_that_torch_reads(
    place: dict[str, str], tmp_path: Path
) -> None:
    """What mpirun starts on a host is what `deepspeed` is given as its program, with the numbers of Open MPI."""
    write_program(tmp_path / "bin" / "mpirun", "exit 1")
    # As `python` of the environment it leaves what a rank would have; as that of the check it tells a port.
    show = (
        f'[[ $1 == - ]] || {{ printf "%s\\n" "$RANK $LOCAL_RANK $WORLD_SIZE $OURS" "$@" >{tmp_path}/rank; }}'
    )
    write_program(tmp_path / "bin" / "python", f"{show}\necho free_port 29555")
    numbers = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_SIZE=4"
    program = f"sed --quiet '/host.sh$/,$p' {tmp_path}/arguments"
    (tmp_path / "launch").write_text(
        f'unset OURS; mapfile -t words < <({program}); {numbers} "${{words[@]}}"'
    )
    more = {"LAUNCHER": "openmpi", "OURS": "1", "FORWARD": "OURS"}
    ended = run_script(SCRIPT, "--recipe", "m3i.demo", "a $b 5%", **place | more)
    assert ended.returncode == 0, ended.stderr
    words = launched(tmp_path)
    assert words[: words.index("--master_addr")] == [
        "--quiet",
        "--hostfile",
        "HOSTFILE",
        "--launcher",
        "openmpi",
    ]
    assert "-x MASTER_ADDR=10.0.0.1 -x MASTER_PORT=29555" in words[words.index("--launcher_args") + 1]
    started = ["3 1 4 1", "-u", f"{ROOT}/pretrain/main.py", "--recipe", "m3i.demo", "a $b 5%"]
    assert (tmp_path / "rank").read_text().splitlines() == started


@pytest.mark.parametrize(
    ("codes", "largest", "expected"),
    [
        ([], 0, 0),
        ([75, 75], 75, PREEMPTED),
        ([76, 247], 247, LOST),
        ([255], 255, LOST),  # ssh: the host is gone
        ([1, 76], 76, FAILED),  # the largest code hides an error that would come again
        ([65, 76], 76, DIVERGED),
        ([2, 2], 2, MISTAKE),
    ],
)
def test_the_code_of_a_run_is_made_of_those_of_its_hosts(
    codes: list[int], largest: int, expected: int, place: dict[str, str], tmp_path: Path
) -> None:
    lines = [
        f"echo 'pdsh@here: node{i}: ssh exited with exit code {code}' >&2" for i, code in enumerate(codes)
    ]
    (tmp_path / "launch").write_text("\n".join([*lines, f"exit {largest}"]))
    assert run_script(SCRIPT, "--recipe", "m3i.demo", **place).returncode == expected


# A rank on a host outlives the launcher, as behind ssh; asked, it ends as one that has saved.
RANK = """import os, pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: (pathlib.Path(sys.argv[1], "asked").touch(), os._exit(75)))
signal.signal(signal.SIGINT, lambda *_: os._exit(130) if sys.argv[2] == "hears" else None)
pathlib.Path(sys.argv[1], "process").write_text(str(os.getpid()))
time.sleep(60)
"""


def _start_with_a_rank(
    place: dict[str, str], tmp_path: Path, rank_does: str = "hears"
) -> tuple[subprocess.Popen[bytes], int]:
    """The script and the process of a rank, which runs."""
    (tmp_path / "rank.py").write_text(RANK)
    rank = f"RANK=0 setsid {sys.executable} {tmp_path}/rank.py {tmp_path} {rank_does} 2>/dev/null & wait $!"
    settings = f". $(sed --quiet '/^--venv_script$/{{n;p}}' {tmp_path}/arguments)"
    (tmp_path / "launch").write_text(f"{settings}\n{rank}")
    kept = {"HOME": str(tmp_path)}
    # Whoever started the tests may have them ignore these, and a script cannot hear what it was born to ignore.
    hearing = ["env", "--default-signal=INT,HUP"]
    job = subprocess.Popen([*hearing, str(ROOT / SCRIPT), "--recipe", "m3i.demo"], env=kept | place)
    file = tmp_path / "process"
    while not (file.is_file() and file.read_text()):
        assert job.poll() is None, "the script ended before its rank began"
        time.sleep(0.02)
    return job, int(file.read_text())


def _lives(process: int) -> bool:
    """Nor is it a zombie, whom nobody has asked for its code."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("asking", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_ranks_of_all_hosts_are_asked_to_save(
    asking: signal.Signals, place: dict[str, str], tmp_path: Path
) -> None:
    job, _ = _start_with_a_rank(place, tmp_path)
    job.send_signal(asking)
    assert job.wait(60) == PREEMPTED
    assert (tmp_path / "asked").exists()


@pytest.mark.parametrize("rank_does", ["hears", "hangs"])
def test_an_interrupted_script_leaves_no_rank_on_a_host(
    rank_does: str, place: dict[str, str], tmp_path: Path
) -> None:
    job, rank = _start_with_a_rank(place, tmp_path, rank_does)
    job.send_signal(signal.SIGINT)
    if rank_does == "hangs":  # and again, when it was heard
        time.sleep(1)
        job.send_signal(signal.SIGINT)
    assert job.wait(60) == INTERRUPTED
    assert not _lives(rank)


def test_a_rank_whose_launcher_is_killed_is_lost_and_ended(place: dict[str, str], tmp_path: Path) -> None:
    job, rank = _start_with_a_rank(place, tmp_path)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    launcher = [child for child in children if "deepspeed" in Path(f"/proc/{child}/cmdline").read_text()]
    os.kill(int(launcher[0]), signal.SIGKILL)
    assert job.wait(60) == LOST
    assert not _lives(rank)
