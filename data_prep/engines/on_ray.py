"""How do the machines of a Ray cluster build shards? One task a shard; a task whose machine dies is run again."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_prep.shard import Finished, Work, build_shard

MAX_RETRIES = 3  # of a task whose process or machine dies


def on_ray(
    numbers: Sequence[int], work_of: Callable[[int], Work], workers: int, advance: Callable[[int], object]
) -> Iterator[tuple[int, Finished]]:
    """Shards as Ray finishes them, at most `workers` at once, on the cluster of RAY_ADDRESS, else on this machine.

    The place of the data set must be one that all machines reach. Raises ImportError without Ray.
    """
    ray = _ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_build)
        waiting, running = iter(numbers), {}
        while True:
            for number in waiting if len(running) < workers else ():
                running[task.remote(work_of(number))] = number
                if len(running) == workers:
                    break
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            for done in ready:
                number = running.pop(done)
                finished = ray.get(done)
                advance(finished.num_items)
                yield number, finished
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise OSError(
            errno.ECHILD,
            f"a task of Ray was killed {MAX_RETRIES + 1} times (out of memory?): run the same command again, with "
            "fewer --workers",
        ) from error
    finally:
        if is_ours:
            ray.shutdown()


def _build(work: Work) -> Finished:
    return build_shard(work, lambda: None)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "engine='ray' needs the package ray here and on all machines: pip install ray==2.60.0, or pass "
            "--engine local"
        ) from error
    return ray
