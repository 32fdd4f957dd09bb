"""How do the executors of a Spark cluster build shards? One task a shard, in groups whose results come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_prep.shard import Finished, Work, build_shard

ROUNDS = 4  # tasks of a slot in one job: fewer leave slots idle at its end, more delay the news of what is finished


def on_spark(
    numbers: Sequence[int], work_of: Callable[[int], Work], workers: int, advance: Callable[[int], object]
) -> Iterator[tuple[int, Finished]]:
    """Shards in groups of ROUNDS x `workers`, on the cluster that spark-submit names, else on this machine.

    The place of the data set must be one that all machines reach. Raises ImportError without Spark.
    """
    context = _context(workers)
    group = ROUNDS * workers
    for start in range(0, len(numbers), group):
        works = [work_of(number) for number in numbers[start : start + group]]
        for number, finished in context.parallelize(works, len(works)).map(_build).collect():
            advance(finished.num_items)
            yield number, finished


def _build(work: Work) -> tuple[int, Finished]:
    return work.number, build_shard(work, lambda: None)


def _context(workers: int) -> Any:
    try:
        from pyspark import SparkConf, SparkContext
    except ImportError as error:
        raise ImportError(
            "engine='spark' needs the package pyspark here and on all machines, and Java: pip install "
            "pyspark==4.3.0, or pass --engine local"
        ) from error
    settings = SparkConf().setAppName("data_prep")
    if not settings.contains("spark.master"):
        settings.setMaster(f"local[{workers}]")
    return SparkContext.getOrCreate(settings)
