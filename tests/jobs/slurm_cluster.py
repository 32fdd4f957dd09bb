"""How does a test get a Slurm of two nodes, and get rid of it? By the reference folder's tool, on this machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.paths import SHARED

TOOL = SHARED / "tools" / "slurm_two_nodes.sh"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
PORTS = (6817, 17001, 17002)  # of the controller and of the tool's nodes
MUNGED = Path("/run/munge/munged.pid")
BEGINS = 60.0  # seconds until two nodes are idle
ENDS = 30.0  # seconds until what was begun is gone


def why_not() -> str:
    """Why there can be no cluster here; "" where there can."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    if not TOOL.is_file():
        return f"{TOOL} is absent"
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return f"another Slurm runs here, port {port} is taken"
    return ""


class Cluster:
    """What a user and an operator say to Slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment.pop("OMP_NUM_THREADS", None)  # the tool asks nproc for the cores, which obeys it

    def tell(self, *command: str, check: bool = True) -> str:
        """What the command prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job, such as JobState, Reason, Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self.tell("scontrol", "show", "job", number)))

    def has_steps(self) -> bool:
        """Whether a step still has processes; of a node that is down Slurm itself does not wait for them."""
        titles = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it ended meanwhile
                titles.append(path.read_bytes())
        return any(title.startswith(b"slurmstepd: [") for title in titles)

    def logs(self) -> str:
        return "\n".join(f"{path}:\n{path.read_text()}" for path in sorted((self.folder / "log").iterdir()))

    def stop(self) -> None:
        """Jobs first, since their processes would outlive the nodes."""
        self.tell("scancel", "--user=root", check=False)
        deadline = time.monotonic() + ENDS
        while self.tell("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        processes = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        self.tell("bash", str(TOOL), "down", str(self.folder), check=False)
        while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, 9)


@contextmanager
def two_nodes(folder: Path) -> Iterator[Cluster]:
    """n1 and n2, idle; nothing of them is left afterwards, whatever happened."""
    had_munged = _is_running(MUNGED)
    cluster = Cluster(folder)
    try:
        with (folder / "up.txt").open("w") as output:  # no pipe: what is started keeps it
            code = subprocess.run(
                ["bash", str(TOOL), "up", str(folder)],
                env=cluster.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=BEGINS,
            ).returncode
        assert code == 0, (folder / "up.txt").read_text() + cluster.logs()
        yield cluster
    finally:
        cluster.stop()
        if not had_munged and _is_running(MUNGED):
            os.kill(int(MUNGED.read_text()), 15)


def _is_running(pid_file: Path) -> bool:
    return pid_file.is_file() and Path(f"/proc/{pid_file.read_text().strip()}").exists()
