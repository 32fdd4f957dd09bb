"""Is the engine still at work? One run of it in a process group, watched, and killed as a whole when it must end.

Every way in which a run can end is a word; whether its shards are good is for others to say.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ENDED, STALLED, LATE, MEMORY, DISK = "ended", "stalled", "late", "memory", "disk"
POLL = 0.1  # seconds between two looks at the process
PATIENCE = 10.0  # seconds for a killed process to end: one that hangs in a network file system does not
LOOK = 1.0  # seconds between two looks at files, memory and disk
START = 60.0  # seconds more without progress for the start: imports from a slow file system
LOG_NAME = "engine.log"
ROWS_DONE = "rows_done"  # folder in the output: one file a process, one byte a row that was tried
COMMAND = (sys.executable, "-m", "data_prep.download.engine")  # and the path of a job
ENVIRONMENT = {  # of the engine
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",  # else a heap for each of many threads
    "PYTHONWARNINGS": "ignore",
}
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Allowed:
    """What a run may use."""

    stall: float  # seconds without progress
    seconds: float  # in all
    memory: int  # resident bytes of any one process
    min_free: int  # bytes of disk that stay free


def watch(job: Path, output: Path, allowed: Allowed, advance: Callable[[int], None]) -> str:
    """Run the engine on `job` until it ends or must end; its whole group is dead on return.

    `advance` gets the number of rows done so far. Returns ENDED, STALLED, LATE, MEMORY or DISK.
    """
    environment = {**os.environ, **ENVIRONMENT}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(job.with_name(LOG_NAME), "ab") as log:
        engine = subprocess.Popen(
            [*COMMAND, str(job)],
            stdin=subprocess.PIPE,  # held open: the engine dies when we do
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        return _watched(engine.pid, output, allowed, advance)
    finally:
        _kill(engine.pid)  # before it is reaped: its number is still its own
        engine.wait()
        engine.stdin.close()


def _kill(group: int) -> None:
    """Kill a group, and return when none of it can write any more."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    patience = time.monotonic() + PATIENCE
    while any(resident(group)) and time.monotonic() < patience:  # what waits for a reaper holds nothing
        time.sleep(POLL / 10)


def _watched(group: int, output: Path, allowed: Allowed, advance: Callable[[int], None]) -> str:
    began = moved = time.monotonic()
    last_look = began - LOOK
    seen: tuple[int, int, int] | None = None
    while os.waitid(os.P_PID, group, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        now = time.monotonic()
        if now - last_look >= LOOK:
            last_look = now
            progress = _progress(output)
            if progress != seen:
                seen, moved = progress, now
                advance(progress[0])
            if shutil.disk_usage(output).free < allowed.min_free:
                return DISK
            if now - began > allowed.seconds:
                return LATE
            if now - moved > allowed.stall + (0 if progress[0] else START):
                return STALLED
            if any(size > allowed.memory for size in resident(group)):
                return MEMORY
        time.sleep(POLL)
    advance(_progress(output)[0])
    return ENDED


def _progress(output: Path) -> tuple[int, int, int]:
    """(rows done, shards done, bytes written) in this folder."""
    rows = shards = size = 0
    with suppress(FileNotFoundError), os.scandir(output) as entries:
        for entry in entries:
            if entry.name.endswith("_stats.json"):
                shards += 1
            elif entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    size += entry.stat().st_size
    with suppress(FileNotFoundError), os.scandir(output / ROWS_DONE) as entries:
        rows = sum(entry.stat().st_size for entry in entries)
    return rows, shards, size


def resident(group: int) -> Iterator[int]:
    """Resident bytes of every process of a group; nothing where there is no /proc."""
    page = os.sysconf("SC_PAGE_SIZE")
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):  # it ended while we looked
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                yield int(fields[21]) * page
