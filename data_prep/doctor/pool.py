"""How is a function applied to many tasks in several processes? A worker that dies raises, it never hangs."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_prep.engines.local import keep_memory

POLL = 0.2  # seconds between two looks at the workers


def each(
    function: Callable[[Any, Callable[[], None]], Any],
    tasks: Iterable[Any],
    workers: int,
    advance: Callable[[int], Any],
) -> Iterator[tuple[int, Any]]:
    """Number and result of every task, as they end; in this process and in order with one worker.

    `function(task, tick)` is a function of a module, its task and result are picklable; a call of `tick` becomes one
    step of `advance` in this process.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1: pass --workers 2")
    if workers == 1:
        for number, task in enumerate(tasks):
            yield number, function(task, lambda: advance(1))
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    waiting = iter(enumerate(tasks))
    shown = 0
    with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
        try:
            running = {
                pool.submit(_work, function, task): number
                for _, (number, task) in zip(range(2 * workers), waiting, strict=False)
            }
            while running:
                ready, _ = wait(running, POLL, FIRST_COMPLETED)
                now = counter.value
                advance(now - shown)
                shown = now
                for future in ready:
                    number = running.pop(future)
                    if (following := next(waiting, None)) is not None:
                        running[pool.submit(_work, function, following[1])] = following[0]
                    yield number, future.result()
        except BrokenProcessPool as error:
            raise OSError(
                errno.ECHILD,
                "a worker was killed (out of memory?): run the same command again, with fewer --workers",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_COUNTER: list[Any] = []  # in a worker: the count of steps shared with the parent


def _start_worker(counter: Any) -> None:
    _COUNTER.append(counter)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:  # a parent that was killed cannot say goodbye
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(function: Callable, task: Any) -> Any:
    return function(task, _tick)


def _tick() -> None:
    counter = _COUNTER[0]
    with counter.get_lock():
        counter.value += 1
