"""How does a benchmark start ranks? The same script again, as processes on the loopback interface, a thread each."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable

WORLD = 2


def on_ranks(script: str, *arguments: str, world: int = WORLD) -> None:
    """Runs `script` on so many gloo ranks; SystemExit when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": port}
    fixed |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env=os.environ | fixed | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"ranks ended with {codes}")


def measure_on_ranks(script: str, purpose: str, measure: Callable[[int], None], rounds: int) -> None:
    """The command line of a benchmark whose ranks call `measure` with the number of rounds, `rounds` by default."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.rounds)
    else:
        on_ranks(script, "--one", "--rounds", str(arguments.rounds))
