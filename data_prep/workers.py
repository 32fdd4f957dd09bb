"""Who builds the shards: this process or several? Both give the same shards, perhaps in another order."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_prep.shard import Finished, Work, build_shard

POLL = 0.2  # seconds between two looks at the workers


def in_this_process(todo: list[Work], workers: int, advance: Callable) -> Iterator[tuple[int, Finished]]:
    """Shards one after the other; the same interface as `in_workers`."""
    for work in todo:
        yield work.number, build_shard(work, advance)


def in_workers(todo: list[Work], workers: int, advance: Callable) -> Iterator[tuple[int, Finished]]:
    """Shards in the order in which `workers` processes finish them; a worker that dies raises, it never hangs."""
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    waiting = iter(todo)
    shown = 0
    with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
        try:
            running = {
                pool.submit(_work, work): work.number
                for _, work in zip(range(workers), waiting, strict=False)
            }
            while running:
                ready, _ = wait(running, POLL, FIRST_COMPLETED)
                now = counter.value
                advance(now - shown)
                shown = now
                for future in ready:
                    number = running.pop(future)
                    if (work := next(waiting, None)) is not None:
                        running[pool.submit(_work, work)] = work.number
                    yield number, future.result()
        except BrokenProcessPool as error:
            raise OSError(
                errno.ECHILD,
                "a worker was killed (out of memory?): run the same command again, with fewer --workers",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_COUNTER: list[Any] = []  # in a worker: the count of items shared with the parent


def _start_worker(counter: Any) -> None:
    _COUNTER.append(counter)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a shard in the making is finished
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:  # a parent that was killed cannot say goodbye
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(work: Work) -> Finished:
    return build_shard(work, _tick)


def _tick() -> None:
    counter = _COUNTER[0]
    with counter.get_lock():
        counter.value += 1
