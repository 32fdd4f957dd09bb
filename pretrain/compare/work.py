"""Which jobs are left, and how are they worked off? Several at a time; what is finished is never done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_prep.schema import write_atomic
from pretrain.compare.plan import Job
from pretrain.main import ROOT

LOG = "output.txt"  # of a job's commands
LAST_LINES = 5  # of it, shown when a command fails
CHECKPOINTS = "checkpoints"
COMPLETE = "COMPLETE"


@dataclass(frozen=True)
class Failure:
    job: Job
    command: tuple[str, ...]
    code: int
    told: str  # last lines of its output


def commands_left(job: Job) -> list[tuple[str, ...]]:
    """What of a job has to be run yet, in its order; ValueError when its folder holds another run."""
    if job.recipe.exists() and job.recipe.read_text() != job.run.to_json():
        raise ValueError(
            f"{job.folder} was begun with another recipe (steps, batch, data or code differ): name another --out, or "
            "delete that folder"
        )
    is_trained = (job.folder / CHECKPOINTS / f"step_{job.run.steps:06d}" / COMPLETE).is_file()
    left = [] if is_trained else [job.train]
    return left + [command for name, command in job.evaluations.items() if not _is_result(job.result(name))]


def _is_result(path: Path) -> bool:
    """Written whole or not at all, so that it is there is enough, unless somebody cut it."""
    if not path.is_file():
        return False
    try:
        return bool(json.loads(path.read_text())["checkpoints"])
    except (ValueError, KeyError, TypeError):
        return False


def work_off(jobs: Sequence[Job], num_at_once: int, say: Callable[[str], None] = print) -> list[Failure]:
    """Runs what is left of all jobs, `num_at_once` side by side; a failed one does not hold the others up.

    An interrupt ends the commands under way; started again, they go on from their checkpoints.
    """
    left = {job.folder: commands_left(job) for job in jobs}
    waiting = [job for job in jobs if left[job.folder]]
    failures: list[Failure] = []
    running = _Running(threads=max((os.cpu_count() or 1) // num_at_once, 1))
    with (
        ThreadPoolExecutor(num_at_once) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="comparison", unit="run") as bar,
    ):
        started = {pool.submit(running.work, job, left[job.folder]): job for job in waiting}
        try:
            for future in as_completed(started):
                failure = future.result()
                bar.update()
                if failure is not None:
                    failures.append(failure)
                    say(_told(failure))
        except KeyboardInterrupt:
            running.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return failures


class _Running:
    """The processes under way, each the head of a group that ends with it."""

    def __init__(self, threads: int) -> None:
        self._threads, self._lock, self._is_stopped = threads, threading.Lock(), False
        self._processes: set[subprocess.Popen[bytes]] = set()

    def work(self, job: Job, commands: list[tuple[str, ...]]) -> Failure | None:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(job.recipe, job.run.to_json().encode())
        for command in commands:
            code = self._run(command, job.folder / LOG)
            if code:
                lines = (job.folder / LOG).read_text(errors="replace").splitlines()
                return Failure(job, command, code, "\n".join(lines[-LAST_LINES:]))
        return None

    def _run(self, command: tuple[str, ...], log: Path) -> int:
        fixed = {
            "OMP_NUM_THREADS": str(self._threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("ab") as file:
            with self._lock:
                if self._is_stopped:
                    return -signal.SIGINT
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=fixed | dict(os.environ),
                    start_new_session=True,
                )
                self._processes.add(process)
            code = process.wait()
        with self._lock:
            self._processes.discard(process)
        return code

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            for process in self._processes:
                os.killpg(process.pid, signal.SIGTERM)


def _told(failure: Failure) -> str:
    return (
        f"{failure.job.folder.name} failed with code {failure.code}; all of its output: {failure.job.folder / LOG}\n"
        f"{failure.told}"
    )
