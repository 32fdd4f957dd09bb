"""Which process makes the next batch? Workers, ahead of time, replaced when they die; or this one."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess

import cv2
import torch
from torch.utils.data import DataLoader

from data_prep.processes import keep_memory
from pretrain.data.faults import DataError
from pretrain.data.left_out import next_kept
from pretrain.data.packed import Packed, pack, unpack
from pretrain.data.room import Rooms
from pretrain.data.steps import Delivery, Steps
from pretrain.preemption import ASKING

MOST_A_CORE = 16  # workers: more have no use
MAX_DEATHS = 5  # of workers within DEATHS_WITHIN, before the machine counts as too small
DEATHS_WITHIN = 3600.0  # seconds
LONGEST_CLOSE = 10.0  # seconds that closing waits for a batch that is being made
HELD = (*ASKING, signal.SIGINT)  # signals that no worker ends by: the trainer ends them
LARGEST = 2**25  # bytes of one piece of memory that a worker keeps, the most by mallopt(3)


class Made:
    """The deliveries of one step after the other, without those in `left_out`.

    They are made by `workers` processes, or in this one without.
    Every process works two batches ahead, and a thread has the next one ready here: what it takes to receive a batch
    is no time of the trainer's. Signals that ask the whole job to stop are the trainer's business: no worker ends by
    them, but all end with it. Workers that die are replaced with a warning and nothing is lost; more
    than MAX_DEATHS within an hour raise DataError. ValueError for more workers than this machine can have a use for.
    """

    def __init__(
        self, steps: Steps, workers: int, start_step: int, left_out: Collection[int] = frozenset()
    ) -> None:
        most = MOST_A_CORE * (os.cpu_count() or 1)
        if not 0 <= workers <= most:
            raise ValueError(
                f"workers={workers} must lie in [0, {most}], {MOST_A_CORE} a core: take one or two a core"
            )
        self._steps, self._workers = steps, workers
        self._deaths: list[float] = []  # when; those of the last DEATHS_WITHIN seconds
        self._left_out = frozenset(left_out)
        self._next_step = next_kept(start_step, self._left_out)
        self._deliveries: Iterator[Packed | DataError] | None = None
        if workers:
            self._deliveries = iter(self._data_loader())
            self._ready: queue.Queue[Delivery | BaseException] = queue.Queue(maxsize=1)
            self._is_closed = threading.Event()
            self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
            self._thread = threading.Thread(target=self._receive, daemon=True)
            self._thread.start()

    def __next__(self) -> Delivery:
        if not self._workers:
            made = self._steps[self._next_step]
            self._advance()
            return made
        received = self._ready.get()
        if isinstance(received, BaseException):
            self._ready.put(received)  # whoever asks again is told again
            raise received
        return received

    def close(self) -> None:
        """Ends the workers, after the batches that they are at or LONGEST_CLOSE seconds."""
        if self._workers:
            self._is_closed.set()
            workers = _workers_of(self._deliveries)
            late = threading.Timer(LONGEST_CLOSE, lambda: [worker.kill() for worker in workers])
            late.daemon = True
            late.start()
            self._thread.join(2 * LONGEST_CLOSE)  # it may wait for a worker
            self._deliveries = None  # the DataLoader's iterator joins its workers when it goes
            late.cancel()

    def _receive(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # where this thread keeps pinned memory
        while not self._is_closed.is_set():
            try:
                received: Delivery | BaseException = self._deliver()
            except BaseException as error:  # for the trainer's thread, all of it
                received = error
            while not self._is_closed.is_set():
                try:
                    self._ready.put(received, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(received, BaseException):
                return
            self._advance()

    def _advance(self) -> None:
        self._next_step = next_kept(self._next_step + 1, self._left_out)

    def _data_loader(self) -> DataLoader:
        return _data_loader(self._steps, self._workers, self._next_step, self._left_out)

    def _deliver(self) -> Delivery:
        """The next step's batch; when a worker has died, all of them begin again at that step."""
        while True:
            try:
                made = next(self._deliveries)
                if isinstance(made, DataError):
                    raise made
                return unpack(made.taken())
            except (RuntimeError, OSError, EOFError):  # torch's own, or of the memory that a worker shared
                dead = _dead_workers(self._deliveries)
                if not dead or self._is_closed.is_set():
                    raise
            now = time.monotonic()
            self._deaths = [*(died for died in self._deaths if now - died < DEATHS_WITHIN), now]
            told = f"worker processes {dead} of the loader died at step {self._next_step}"
            if len(self._deaths) > MAX_DEATHS:
                raise DataError(
                    f"{told}, for the {len(self._deaths)}. time within {DEATHS_WITHIN / 60:g} minutes: if the system "
                    "killed them for memory, lower --workers"
                )
            warnings.warn(f"{told}: new ones go on from there", stacklevel=3)
            self._deliveries = None  # ends the others
            self._deliveries = iter(self._data_loader())


class _Told:
    """The steps, packed; what is wrong with the data is a result: torch would raise it with a worker's traceback."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self._rooms = steps, Rooms()

    def __reduce__(self) -> tuple:
        return _Told, (self._steps,)

    def __getitem__(self, step: int) -> Packed | DataError:
        try:
            return pack(self._steps.make(step, self._rooms), self._rooms)
        except DataError as error:
            return error


def _unchanged(made: Packed | DataError) -> Packed | DataError:
    return made


class _StepNumbers:
    """Sampler: every step from `start` on that is not left out."""

    def __init__(self, start: int, left_out: frozenset[int]) -> None:
        self._start, self._left_out = start, left_out

    def __iter__(self) -> Iterator[int]:
        return (step for step in itertools.count(self._start) if step not in self._left_out)


def _data_loader(steps: Steps, workers: int, start_step: int, left_out: frozenset[int]) -> DataLoader:
    """torch's DataLoader with one whole batch an item; workers start from a clean process, because a fork
    of a trainer that runs threads (NCCL, gloo) may deadlock."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    _start_servers()
    return DataLoader(
        _Told(steps),  # a map-style dataset is what has __getitem__
        sampler=_StepNumbers(start_step, left_out),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_start_worker,
        multiprocessing_context=context,
        generator=torch.Generator(),  # of seeds that nothing uses; the global one belongs to training
    )


def _start_servers() -> None:
    """Starts what makes the workers; signals to the whole job are blocked there, and in its forks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for ensure_running in (resource_tracker.ensure_running, forkserver.ensure_running):
            signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # each time: Python's tracker lets two in again
            ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _workers_of(deliveries: Iterator[Packed | DataError] | None) -> list[BaseProcess]:
    return getattr(deliveries, "_workers", [])  # torch has no public name for them


def _dead_workers(deliveries: Iterator[Packed | DataError]) -> list[int]:
    """Process numbers; a worker's death may be seen through its memory before the system tells of it."""
    workers = _workers_of(deliveries)
    for _ in range(10):
        if dead := [worker.pid for worker in workers if not worker.is_alive()]:
            return dead
        time.sleep(0.1 * bool(workers))
    return []


def _start_worker(worker: int) -> None:
    """One thread (torch's DataLoader sees to torch's own), an allocator that keeps its memory, and an end by the
    trainer alone: torch's own watchdog sees only the fork server, which outlives a trainer that was killed.

    What was imported so far stays, so the garbage collector need not look through it again and again.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    cv2.setNumThreads(1)
    gc.freeze()
    keep_memory(LARGEST)
    for end in (_end_with_trainer, _end_when_told):
        threading.Thread(target=end, daemon=True).start()


def _end_with_trainer() -> None:
    _trainer().join()
    os._exit(1)


def _end_when_told() -> None:
    """Signals that come from elsewhere are for the trainer, which then needs what is made here."""
    trainer = _trainer().pid
    while signal.sigwaitinfo(ASKING).si_pid != trainer:
        pass
    os._exit(1)


def _trainer() -> BaseProcess:
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "only worker processes wait for the trainer"
    return trainer
