"""Why is a sample left out, and when are there too many of them?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

WHOLE_SHARD = -1
MIN_READS = 100  # the limit on bad samples is taken over at least this many reads


class BadSample(ValueError):
    """One sample cannot be used; training takes the next of its source and counts `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason  # a short name, the key of the counts


class Dropped(NamedTuple):
    """A sample that was replaced, where it lies and why."""

    source: str
    shard: str
    index: int  # inside the shard; WHOLE_SHARD for all of it
    reason: str
    message: str

    @property
    def kind(self) -> str:
        """What is counted together."""
        return f"{self.source}: {self.reason}"

    def __str__(self) -> str:
        what = "" if self.index == WHOLE_SHARD else f" sample {self.index}"
        return f"{self.source}/{self.shard}{what}: {self.reason}: {self.message}"


class DataError(ValueError):
    """The data as a whole cannot be trained on."""


def check_bad_share(dropped: Mapping[str, int], num_reads: int, limit: float, last: str) -> None:
    """Raise DataError when more than `limit` of the samples read (of at least MIN_READS) were bad.

    `last` describes the latest bad sample, so that the message leads to one.
    """
    num_bad = sum(dropped.values())
    if num_bad > limit * max(num_reads, MIN_READS):
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(dropped.items()))
        raise DataError(
            f"{num_bad} of the {num_reads} samples read so far are bad ({counts}; the last: {last}), "
            f"max_bad={limit} allows {int(limit * max(num_reads, MIN_READS))}: run `python -m data_prep check` "
            "on the data sets and build them again, or raise max_bad"
        )
