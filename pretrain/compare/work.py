"""Which jobs are left, and how are they worked off? Several at a time; what is finished is never done again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_prep.files import write_atomic
from pretrain.arguments import ROOT
from pretrain.checkpoint import checkpoint_folder
from pretrain.compare.plan import ALL_STEPS, TRAIN, Job, Task
from pretrain.config import Run
from pretrain.intact import verify
from pretrain.lock import Busy, only_writer

LOG = "output.txt"  # of a job's commands
SECONDS_TO_LOOK_AGAIN = 2.0  # whether a folder is free
LAST_LINES = 5  # of it, shown when a command fails


@dataclass(frozen=True)
class Failure:
    job: Job
    task: Task
    code: int
    told: str  # last lines of its output


def tasks_left(job: Job) -> list[Task]:
    """What of a job has to be run yet, in its order; ValueError when its folder holds another run."""
    train = next(task for task in job.tasks if task.name == TRAIN)
    is_other = job.recipe.exists() and _recipe(job) != job.run
    told = _told(job, TRAIN)
    if is_other or told not in (None, train.asked):
        raise ValueError(
            f"{job.folder} was begun, or prepared by --dry-run, with another recipe (steps, batch, labels), other "
            "data or another guide: name another --out, or delete that folder"
        )
    checkpoint = checkpoint_folder(job.folder, job.run.steps)
    is_trained = told is not None and checkpoint.is_dir() and verify(checkpoint, hashes=False) is None
    return [
        task for task in job.tasks if not is_trained or (task.name != TRAIN and not is_evaluated(job, task))
    ]


def _recipe(job: Job) -> Run | None:
    """The run that the folder was begun with; None where its recipe cannot be read."""
    try:
        return Run.from_json(job.recipe.read_text())
    except ValueError:
        return None


def is_evaluated(job: Job, task: Task) -> bool:
    """Is there a result of what the task asks now? One that tells more of the run's steps is one too."""
    result = _json(job.result(task.name))
    is_whole = (
        isinstance(result, dict) and isinstance(result.get("checkpoints"), dict) and result["checkpoints"]
    )
    return bool(is_whole) and _told(job, task.name) in (task.asked, task.asked | {"steps": ALL_STEPS})


def _told(job: Job, name: str) -> object:
    """What a finished task was asked; None where it is not finished."""
    return _json(job.done(name))


def _json(path: Path) -> object:
    """The content of a file, None when it is not there or was cut."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def prepare(job: Job) -> None:
    """Makes the folder, the recipe in it that the commands read, and what each of them is asked."""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(job.recipe, job.run.to_json().encode())
    for task in job.tasks:
        write_atomic(job.todo(task), json.dumps(task.asked).encode())


def shell_line(job: Job, task: Task) -> str:
    """A prepared task as a line of a shell, from anywhere; when it has run, the task counts as finished."""
    finish = ["cp", str(job.todo(task)), str(job.done(task.name))]
    return f"cd {shlex.quote(str(ROOT))} && {shlex.join(task.command)} && {shlex.join(finish)}"


def work_off(
    jobs: Sequence[Job], num_at_once: int, ranks: int = 1, say: Callable[[str], None] = print
) -> list[Failure]:
    """Runs what is left of all jobs, `num_at_once` of `ranks` processes side by side; a failed one does not hold the
    others up.

    An interrupt ends the commands under way; started again, they go on from their checkpoints.
    """
    left = {job.folder: tasks_left(job) for job in jobs}
    waiting = [job for job in jobs if left[job.folder]]
    failures: list[Failure] = []
    running = _Running(threads=max((os.cpu_count() or 1) // (num_at_once * ranks), 1))
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
                    say(_message(failure))
        except BaseException:
            running.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return failures


class _Running:
    """The processes under way, each the head of a group that ends with it."""

    def __init__(self, threads: int) -> None:
        self._threads, self._lock, self._is_stopped = threads, threading.Lock(), False
        self._processes: set[subprocess.Popen[bytes]] = set()

    def work(self, job: Job, tasks: list[Task]) -> Failure | None:
        self._wait_for(job.folder)
        prepare(job)
        for task in tasks:
            job.done(task.name).unlink(missing_ok=True)
            log = job.folder / LOG
            earlier = log.stat().st_size if log.exists() else 0
            code = self._run(task.command, log)
            if code:
                lines = log.read_bytes()[earlier:].decode(errors="replace").splitlines()
                return Failure(job, task, code, "\n".join(lines[-LAST_LINES:]))
            write_atomic(job.done(task.name), json.dumps(task.asked).encode())
        return None

    def _wait_for(self, folder: Path) -> None:
        """Returns when nobody writes to the folder: a training outlives a comparison that was killed."""
        is_told = False
        while not self._is_stopped:
            try:
                with only_writer(folder):
                    return
            except Busy as error:
                if not is_told:
                    tqdm.write(f"waiting: {error}")
                is_told = True
                time.sleep(SECONDS_TO_LOOK_AGAIN)

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


def _message(failure: Failure) -> str:
    return (
        f"{failure.job.folder.name} failed with code {failure.code}; all of its output: {failure.job.folder / LOG}\n"
        f"{failure.told}"
    )
