"""Why is a sample left out, and when are there too many of them?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from data_prep.schema import WHOLE_SHARD

MIN_READS = 100  # the limit on bad samples is taken over at least this many reads
MOST_SENT = 100  # letters of why a sample cannot be used, where dozens are told at once
A_FEW = 3  # bad samples beyond what chance explains
OF_TRAINING = "run `python -m data_prep check` on the data sets and build them again, or raise max_bad"
# Reasons that concern a shard as a whole.
OF_SHARDS = ("missing_shard", "truncated_shard", "changed_shard", "broken_index")


class BadSample(ValueError):
    """One sample cannot be used; training takes the next of its source and counts `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason  # a short name, the key of the counts

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        """A process may send it to others."""
        return type(self), (self.reason, str(self))


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


class NoneUsable(DataError):
    """So many samples in turn were tried for one position that the data counts as broken."""

    def __init__(self, message: str, tried: tuple[Dropped, ...]) -> None:
        super().__init__(message)
        self.tried = tried

    def __reduce__(self) -> tuple[type[NoneUsable], tuple[str, tuple[Dropped, ...]]]:
        """A worker sends it to the trainer, in a message that should be short."""
        return type(self), (
            str(self),
            tuple(one._replace(message=one.message[:MOST_SENT]) for one in self.tried),
        )


class DataAway(DataError):
    """The place of the data fails now, and may serve later."""


class NobodyThere(DataAway):
    """No store takes questions at an address that never served this machine: it may be a wrong one."""


def exactly(limit: float, num_reads: int) -> float:
    """Bad samples that one judge of all samples allows."""
    return limit * max(num_reads, MIN_READS)


def beyond_chance(limit: float, num_reads: int) -> float:
    """Bad samples that each of hundreds of judges allows: four standard deviations and a few more, or one of them
    would stop a run whose data is good enough. None where the limit is 0."""
    expected = limit * num_reads
    return expected + 4 * expected**0.5 + (A_FEW if limit else 0)


def check_bad_share(
    dropped: Mapping[str, int],
    num_reads: int,
    limit: float,
    last: str,
    allowed: Callable[[float, int], float] = exactly,
    remedy: str = OF_TRAINING,
) -> None:
    """Raise DataError when more of the samples read were bad than a share of `limit` allows.

    `last` describes the latest bad sample, so that the message leads to one; `remedy` says what to do.
    """
    num_bad, most = sum(dropped.values()), allowed(limit, num_reads)
    if num_bad > most:
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(dropped.items()))
        raise DataError(
            f"{num_bad} of the {num_reads} samples read so far are bad ({counts}; the last: {last}), "
            f"max_bad={limit} allows {int(most)}: {remedy}"
        )
