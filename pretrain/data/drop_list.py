"""How does a rank list which samples its run left out, each once, and what does such a list tell?

Lines of JSON: a sample where it is left out first, and of every later step how many of the samples that the list
names already were left out again, so that counts are right also for a run that goes on from any step before.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.files import write_atomic
from data_prep.schema import WHOLE_SHARD
from pretrain.data.faults import OF_SHARDS, Dropped

NAME = "dropped-rank_{:05d}.jsonl"  # in the folder of a run
TAKEN = ".taken_by_"  # ends, with a rank's number, the name of a list that this rank takes over


class Cause(NamedTuple):
    """What is counted together in a line; the shard counts where its loss is the reason."""

    source: str
    shard: str  # "" where it is as it was
    reason: str

    @classmethod
    def of(cls, sample: Dropped) -> Cause:
        return cls(sample.source, sample.shard if sample.reason in OF_SHARDS else "", sample.reason)

    @property
    def kind(self) -> str:
        """As `Dropped.kind`."""
        return f"{self.source}: {self.reason}"


class Record(NamedTuple):
    """A line of a list: a sample, or how often which causes left out samples again."""

    step: int
    rank: int  # that did this step
    sample: Dropped | None
    again: Mapping[Cause, int]

    def text(self) -> str:
        told = {"step": self.step, "rank": self.rank}
        if self.sample is not None:
            return json.dumps(told | self.sample._asdict()) + "\n"
        return json.dumps(told | {"again": [[*cause, count] for cause, count in self.again.items()]}) + "\n"

    def causes(self) -> Mapping[Cause, int]:
        return self.again if self.sample is None else {Cause.of(self.sample): 1}


class Named:
    """The samples that a list names: a bit each, of which a run may keep millions."""

    def __init__(self) -> None:
        self._bits: dict[
            tuple[str, str], int
        ] = {}  # source and shard -> bit i + 1 for sample i, 0 for all of it

    def add(self, sample: Dropped) -> bool:
        """Whether it was not there before."""
        place, bit = (sample.source, sample.shard), 1 << (sample.index - WHOLE_SHARD)
        before = self._bits.get(place, 0)
        self._bits[place] = before | bit
        return not before & bit


def records(path: Path) -> Iterator[Record]:
    """The lines of a file one by one, without those that a crash damaged."""
    if not path.is_file():
        return
    with path.open(errors="replace") as lines:
        for line in lines:
            try:
                record = _record(json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue
            yield record


def _record(found: Mapping[str, Any]) -> Record:
    at = found["step"], found.get("rank", 0)  # lists of earlier versions do not say it
    if "again" in found:
        return Record(*at, None, {Cause(*cause): count for *cause, count in found["again"]})
    return Record(*at, Dropped(*(found[name] for name in Dropped._fields)), {})


def file_of(folder: Path, rank: int, world: int) -> Path:
    """Where a rank lists its drops in the folder of a run; it takes over the lists of ranks that are no more.

    Such a list is renamed first: should this start be killed before it is removed, another one with so many ranks
    that there is one of this number again finds it taken.
    """
    own = folder / NAME.format(rank)
    for path in folder.glob(NAME.replace("{:05d}", "*[0-9]")):
        number = int(path.stem.rpartition("_")[2])
        if number >= world and number % world == rank:
            path.rename(folder / f"{path.stem}-{time.time_ns()}{TAKEN}{rank}")
    taken = sorted(
        path for path in folder.glob(f"*{TAKEN}*[0-9]") if int(path.suffix[len(TAKEN) :]) % world == rank
    )
    if taken:
        write_atomic(own, "".join(record.text() for record in _merged([own, *taken])).encode())
        for path in taken:
            path.unlink()
    return own


def _merged(lists: Iterable[Path]) -> list[Record]:
    """One list that names each sample where any of them does first, and counts what all of them do.

    What a rank left out at a step stands in one list. Another one may tell all of it once more, of a start that was
    killed after it had taken over a list and before it removed that: this counts once.
    """
    first: dict[tuple[str, str, int], Record] = {}
    happened: dict[tuple[int, int], Counter[Cause]] = defaultdict(Counter)
    for path in lists:
        here: dict[tuple[int, int], Counter[Cause]] = defaultdict(Counter)
        for record in records(path):
            here[record.step, record.rank].update(record.causes())
            if record.sample is not None:
                known = first.setdefault(record.sample[:3], record)
                if record.step < known.step:
                    first[record.sample[:3]] = record
        for at, causes in here.items():
            happened[at] |= causes
    for record in first.values():
        happened[record.step, record.rank].subtract(record.causes())
    again = [Record(*at, None, dict(+causes)) for at, causes in happened.items()]
    return sorted([*first.values(), *(one for one in again if one.again)], key=lambda one: one[:2])
