"""How do the cores of this machine build shards? In this process or in several; one that is killed is replaced."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_prep.shard import Finished, Work, build_shard

POLL = 0.2  # seconds between two looks at the workers
MAX_DEATHS = 3  # of workers while one and the same shard is in the making
KEPT_MEMORY = 2**28  # bytes that the C library keeps instead of giving them back after every picture
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def on_this_machine(
    numbers: Sequence[int], work_of: Callable[[int], Work], workers: int, advance: Callable[[int], object]
) -> Iterator[tuple[int, Finished]]:
    """Shards as `workers` processes finish them; in this process when one is enough.

    A worker that is killed (out of memory?) is replaced and its shard begun again, MAX_DEATHS times; then OSError.
    """
    if workers == 1 or len(numbers) < 2:
        keep_memory()
        for number in numbers:
            yield number, build_shard(work_of(number), lambda: advance(1))
        return
    left, deaths = list(numbers), Counter()
    while left:
        try:
            for number, finished in _in_workers(left, work_of, min(workers, len(left)), advance, deaths):
                left.remove(number)
                yield number, finished
        except BrokenProcessPool as error:
            if worst := [number for number, count in deaths.items() if count >= MAX_DEATHS]:
                raise OSError(
                    errno.ECHILD,
                    f"a worker was killed {MAX_DEATHS} times while shards {worst} were in the making (out of "
                    "memory?): run the same command again, with fewer --workers",
                ) from error


def _in_workers(
    numbers: Sequence[int],
    work_of: Callable[[int], Work],
    workers: int,
    advance: Callable[[int], object],
    deaths: Counter[int],
) -> Iterator[tuple[int, Finished]]:
    """Shards until all are finished or a worker dies, which adds one to `deaths` of those in the making."""
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    waiting, shown, num_done = iter(list(numbers)), 0, 0
    running: dict[Future[Finished], int] = {}
    with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
        try:
            while True:
                for number in waiting if len(running) < workers else ():
                    running[pool.submit(_work, work_of(number))] = number
                    if len(running) == workers:
                        break
                if not running:
                    return
                ready, _ = wait(running, POLL, FIRST_COMPLETED)
                now = counter.value
                advance(now - shown)
                shown = now
                # those that are well first: after a death they need not be made again
                for future in sorted(ready, key=lambda done: done.exception() is not None):
                    finished = future.result()
                    num_done += finished.num_items
                    yield running.pop(future), finished
        except BrokenProcessPool:
            advance(num_done - shown)  # what the others had begun is begun again
            deaths.update(running.values())
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_COUNTER: list[Any] = []  # in a worker: the count of items shared with the parent


def _start_worker(counter: Any) -> None:
    _COUNTER.append(counter)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a shard in the making is finished
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:  # a parent that was killed cannot say goodbye
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def keep_memory() -> None:
    """Let this process reuse the memory of one picture for the next, which saves the kernel's time; on glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_MEMORY)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_MEMORY)


def _work(work: Work) -> Finished:
    return build_shard(work, _tick)


def _tick() -> None:
    counter = _COUNTER[0]
    with counter.get_lock():
        counter.value += 1
