"""How is a function applied to many tasks in several processes? A worker that dies raises, it never hangs."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_prep.processes import POLL, counting_workers, tick


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
    waiting = iter(enumerate(tasks))
    with counting_workers(workers) as (pool, counted):
        try:
            running = {
                pool.submit(_work, function, task): number
                for _, (number, task) in zip(range(2 * workers), waiting, strict=False)
            }
            while running:
                ready, _ = wait(running, POLL, FIRST_COMPLETED)
                advance(counted())
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


def _work(function: Callable, task: Any) -> Any:
    return function(task, tick)
