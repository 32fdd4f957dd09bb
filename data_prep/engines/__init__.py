"""Who builds the shards? One entry a kind of engine; all give the same shards, perhaps in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from data_prep.engines.local import on_this_machine
from data_prep.engines.on_ray import on_ray
from data_prep.engines.on_spark import on_spark
from data_prep.shard import Finished, Work

# (works by number, how many at once, called with the number of items done) -> shards as they are finished.
# A work is asked for when its turn comes, so that the items of all shards need not be in memory together.
Engine = Callable[
    [Sequence[int], Callable[[int], Work], int, Callable[[int], object]], Iterator[tuple[int, Finished]]
]

ENGINES: dict[str, Engine] = {"local": on_this_machine, "ray": on_ray, "spark": on_spark}
