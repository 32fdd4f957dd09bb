"""How does a test start ranks? As processes of their own on the loopback interface."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing

from tests.paths import ROOT

TIMEOUT = 420  # seconds; a launch takes about 20 of a free processor, most of them imports


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = folder / f"output_{world}.txt"
    with log.open("w") as file:
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(folder), *arguments],
                env=environment(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world), MASTER_PORT=port),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for r in range(world)
        ]
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
    return codes, log.read_text()


def together(function: Callable[..., None], *arguments: Any, world: int) -> None:
    """function(rank, *arguments) in `world` processes at once, forked from one that has imported what they need."""
    multiprocessing.set_forkserver_preload(["pretrain.data.workers"])  # as loaders do, who share the server
    torch.multiprocessing.start_processes(function, arguments, nprocs=world, start_method="forkserver")


def environment(**added: str) -> dict[str, str]:
    """Of a process that trains on the CPU with one thread."""
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | fixed | {"MASTER_ADDR": "127.0.0.1"} | added
