"""How does a test start ranks? As processes of their own on the loopback interface, forks of one that is warm."""

from __future__ import annotations

import atexit
import functools
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.paths import ROOT

TIMEOUT = 420  # seconds


def launch(folder: Path, *scenarios: str, world: int = 2) -> dict[str, Any]:
    """result.json of scenarios of ranks.py; AssertionError with the output when a rank fails."""
    codes, output = start(folder, *scenarios, world=world)
    assert codes == [0] * world, f"{scenarios} ended with {codes}:\n{output}"
    return json.loads((folder / "result.json").read_text())


def start(
    folder: Path,
    *arguments: str,
    world: int,
    script: Path = ROOT / "tests" / "engine" / "ranks.py",
    timeout: float = TIMEOUT,
) -> tuple[list[int], str]:
    """Exit codes by rank (minus the signal if killed) and the joint output of `script FOLDER *arguments`."""
    log = folder / f"output_{world}.txt"
    return run_ranks(
        [str(script), str(folder), *arguments], log, world=world, timeout=timeout
    ), log.read_text()


def run_ranks(
    command: Sequence[str], log: Path, *, world: int, timeout: float = TIMEOUT, kill_at: str | None = None
) -> list[int]:
    """Exit codes of `python *command` on every rank, whose joint output is in `log`; SIGKILL to all as soon as that
    has the words `kill_at`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": str(world), "MASTER_PORT": str(free.getsockname()[1])}
    log.write_text("")
    ranks = [environment(RANK=str(r), LOCAL_RANK=str(r), **place) for r in range(world)]
    asked = {"command": list(command), "environments": ranks, "log": str(log), "timeout": timeout}
    asked["kill_at"] = kill_at
    server = _warm()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the process that forks ranks ended with {server.wait()}"
    return json.loads(answer)


@functools.cache
def _warm() -> subprocess.Popen[str]:
    """The process that forks ranks; it ends when its standard input does, so also with this one if that is killed."""
    command = [sys.executable, str(ROOT / "tests" / "engine" / "warm.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command, env=environment(), text=True, **pipes)
    atexit.register(server.communicate)
    return server


def together(function: Callable[..., None], *arguments: Any, world: int) -> None:
    """function(rank, *arguments) on so many ranks; AssertionError with their output when one fails."""
    with tempfile.TemporaryDirectory() as folder:
        asked, log = Path(folder, "asked"), Path(folder, "output.txt")
        asked.write_bytes(pickle.dumps((function, arguments)))
        codes = run_ranks([str(ROOT / "tests" / "engine" / "call.py"), str(asked)], log, world=world)
        assert codes == [0] * world, f"{function.__name__} ended with {codes}:\n{log.read_text()}"


def in_float32(name: str, folder: Path) -> Path:
    """A copy of ds_configs/NAME.json in `folder` with float32 also where a CPU multiplies bfloat16 in hardware."""
    ds_config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    ds_config["bf16"]["enabled"] = False
    path = folder / f"{name}.json"
    path.write_text(json.dumps(ds_config))
    return path


def environment(**added: str) -> dict[str, str]:
    """Of a process that trains on the CPU with one thread."""
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | fixed | {"MASTER_ADDR": "127.0.0.1"} | added
