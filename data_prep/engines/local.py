"""How do the cores of this machine build shards? In this process or in several; one that is killed is replaced."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool

from data_prep.processes import POLL, counting_workers, keep_memory, tick
from data_prep.shard import Finished, Work, build_shard

MAX_DEATHS = 3  # of workers while one and the same shard is in the making


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
    waiting, num_shown, num_done = iter(list(numbers)), 0, 0
    running: dict[Future[Finished], int] = {}
    with counting_workers(workers) as (pool, counted):
        try:
            while True:
                for number in waiting if len(running) < workers else ():
                    running[pool.submit(_work, work_of(number))] = number
                    if len(running) == workers:
                        break
                if not running:
                    return
                ready, _ = wait(running, POLL, FIRST_COMPLETED)
                advance(num_new := counted())
                num_shown += num_new
                # those that are well first: after a death they need not be made again
                for future in sorted(ready, key=lambda done: done.exception() is not None):
                    finished = future.result()
                    num_done += finished.num_items
                    yield running.pop(future), finished
        except BrokenProcessPool:
            advance(num_done - num_shown)  # what the others had begun is begun again
            deaths.update(running.values())
            raise


def _work(work: Work) -> Finished:
    return build_shard(work, tick)
