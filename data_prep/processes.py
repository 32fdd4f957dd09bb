"""How are worker processes started, so that they count for their parent, outlive no parent and heed no Ctrl-C?"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

POLL = 0.2  # seconds between two looks at the workers
KEPT_MEMORY = 2**28  # bytes that the C library keeps instead of giving them back after every picture
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@contextmanager
def counting_workers(workers: int) -> Iterator[tuple[ProcessPoolExecutor, Callable[[], int]]]:
    """A pool of so many fresh processes until the block ends, and how often they called `tick` since it was asked."""
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    shown = 0

    def counted() -> int:
        nonlocal shown
        before, shown = shown, counter.value
        return shown - before

    with ProcessPoolExecutor(workers, context, _start, (counter,)) as pool:
        try:
            yield pool, counted
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def tick() -> None:
    """In a worker: one more item is done."""
    counter = _COUNTER[0]
    with counter.get_lock():
        counter.value += 1


def keep_memory(largest: int = KEPT_MEMORY) -> None:
    """Let this process reuse the memory of one picture for the next, as fresh pages cost as much as decoding.

    glibc alone can. What takes more than `largest` bytes at once is given back all the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, largest)
        mallopt(M_TRIM_THRESHOLD, KEPT_MEMORY)


_COUNTER: list[Any] = []  # in a worker: the count of items shared with the parent


def _start(counter: Any) -> None:
    _COUNTER.append(counter)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; what is in the making is finished
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:  # a parent that was killed cannot say goodbye
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
