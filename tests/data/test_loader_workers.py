"""Do the processes that make batches end, die and fail without harm?"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import cv2
import numpy as np
import pytest
import torch

from data_prep import processes
from pretrain.config import Source, Views
from pretrain.data.faults import DataError
from pretrain.data.loader import Loader
from pretrain.data.steps import Steps
from pretrain.data.workers import Made
from tests.data.delivered import assert_same, batches
from tests.data.sets import encoded, small_run, write_set
from tests.paths import ROOT


def test_a_closed_loader_says_so_and_leaves_no_worker(folders: dict[str, Path]) -> None:
    loader = Loader(small_run(), folders, None, rank=0, world=1, workers=1)
    next(loader)
    assert len(multiprocessing.active_children()) == 1
    loader.close()
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)


def test_a_worker_that_is_stuck_is_killed_at_the_close(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.workers.LONGEST_CLOSE", 0.2)
    loader = Loader(small_run(), folders, None, rank=0, world=1, workers=1)
    next(loader)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    loader.close()
    assert worker.exitcode == -signal.SIGKILL


TRAINER = """
import os, pickle, signal, sys, warnings
from itertools import islice
from multiprocessing import active_children, forkserver, resource_tracker
from pretrain.data.loader import Loader
from pretrain.preemption import Signals

if __name__ == "__main__":
    run, folders = pickle.load(open(sys.argv[1], "rb"))
    warnings.simplefilter("error")  # of new workers
    with Signals() as signals:
        loader = Loader(run, folders, None, rank=0, world=1, workers=2)
        next(loader)
        workers = active_children()
        servers = [forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid]
        with open(f"/proc/{servers[0]}/status") as status:  # it held them while it imported, too
            (held,) = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk")]
        assert all(held >> number - 1 & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.system(f"kill -{int(number)} 0")  # from a shell: what this process itself sends is obeyed
        assert signals.received
        list(islice(loader, 9))  # both take part
        assert all(worker.is_alive() for worker in workers) and len(active_children()) == 2
        assert all(os.waitpid(server, os.WNOHANG) == (0, 0) for server in servers)
    workers[0].terminate()  # as Python does with all at the trainer's end
    workers[0].join(20)
    assert not workers[0].is_alive()
    print(workers[1].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_the_trainer_and_by_no_signal_to_the_whole_job(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    run = small_run(data={"names": Source("category")})
    (tmp_path / "job.pickle").write_bytes(pickle.dumps((run, {"names": folders["names"]})))
    (tmp_path / "trainer.py").write_text(TRAINER)
    trainer = subprocess.run(
        [sys.executable, tmp_path / "trainer.py", tmp_path / "job.pickle"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        start_new_session=True,
        timeout=120,
    )
    assert trainer.returncode == -signal.SIGKILL, "it was disturbed, see its output"
    (worker,) = map(int, trainer.stdout.split())
    with contextlib.suppress(ProcessLookupError):  # ended already
        ended = os.pidfd_open(worker)
        assert select.select([ended], [], [], 20)[0], "the worker outlives its trainer by 20 seconds"
        os.close(ended)


def test_workers_that_are_killed_now_and_then_are_replaced_and_nothing_is_lost(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.workers.MAX_DEATHS", 1)
    monkeypatch.setattr("pretrain.data.workers.DEATHS_WITHIN", 1e-6)
    run = small_run()
    loader = Loader(run, folders, None, rank=0, world=1, workers=2)
    delivered = [next(loader)]
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"worker processes \[\d+\] of the loader died at step \d+: new ones go on"
        ):
            os.kill(loader._made._deliveries._workers[0].pid, signal.SIGKILL)
            delivered += islice(loader, 7)
    loader.close()
    for one, other in zip(delivered, batches(run, folders, 15), strict=True):
        assert_same(one, other)


def test_a_worker_that_is_killed_while_it_sends_large_files_is_replaced(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (400, 500, 3)).astype(np.uint8)
    jpeg = encoded(noise, quality=95)  # more than a pipe takes at once
    assert len(jpeg) > 2**17
    folder = write_set(tmp_path / "large", [[{"jpg": jpeg, "cls": b"0", "json": b"{}"}] * 8])
    run = small_run(data={"large": Source("category")}, views=Views(size=16, on_device="all"))
    loader = Loader(run, {"large": folder}, None, rank=0, world=1, workers=1)
    next(loader)
    with pytest.warns(UserWarning, match=r"died at step \d+: new ones go on"):
        os.kill(loader._made._deliveries._workers[0].pid, signal.SIGKILL)
        list(islice(loader, 6))
    loader.close()


class TellingOfItsProcess(Steps):
    """Makes no batch."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []  # of mallopt: a setting, its value, and 1 where that was taken

    def __reduce__(self) -> tuple:
        return _arrived, ()

    def make(self, step: int, rooms: object = None) -> NoReturn:
        threads = [torch.get_num_threads(), cv2.getNumThreads()]
        raise DataError(json.dumps([*threads, gc.get_freeze_count() > 0, sorted(self.asked)]))


def _arrived() -> TellingOfItsProcess:
    """In a worker, before that is set up."""
    steps, mallopt = TellingOfItsProcess(), ctypes.CDLL(None).mallopt

    def recorded(*setting: int) -> None:
        steps.asked.append([*setting, mallopt(*setting)])

    processes.ctypes = SimpleNamespace(CDLL=lambda name: SimpleNamespace(mallopt=recorded))
    return steps


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_a_worker_has_one_thread_and_keeps_its_memory() -> None:
    made = Made(TellingOfItsProcess(), 1, 0)
    with pytest.raises(DataError) as told:
        next(made)
    made.close()
    *threads, has_frozen, asked = json.loads(str(told.value))
    assert threads == [1, 1] and has_frozen
    assert asked == [[-3, 2**25, 1], [-1, 2**28, 1]], "M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, both taken"


def test_what_is_wrong_with_the_data_is_told_without_a_workers_traceback(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "spoilt", [[{"jpg": b"", "cls": b"0", "json": b"{}"}] * 3])
    run = small_run(data={"spoilt": Source("category")}, max_bad=1.0)
    loader = Loader(run, {"spoilt": folder}, None, rank=0, world=1, workers=1)
    for _ in range(2):  # and again to whoever asks again
        with pytest.raises(DataError, match=r"^32 samples of source 'spoilt' in turn cannot be used"):
            next(loader)
    loader.close()


def test_more_workers_than_have_a_use_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"workers=100000 must lie in \[0, \d+\], 16 a core"):
        Loader(small_run(), folders, None, rank=0, world=1, workers=100_000)


def test_workers_that_keep_dying_end_the_run_with_a_remedy(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.workers.MAX_DEATHS", 0)
    loader = Loader(small_run(), folders, None, rank=0, world=1, workers=1)
    next(loader)
    os.kill(loader._made._deliveries._workers[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"for the 1. time within 60 minutes: .* lower --workers"):
        list(islice(loader, 9))
    loader.close()
