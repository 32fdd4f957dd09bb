"""What is wrong with each sample that training left out? Its list of drops is read, and those samples alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from data_prep.check import examine_shard
from data_prep.doctor.finished import BadDataSet, manifest_at
from data_prep.doctor.members import read_sample
from data_prep.doctor.verify import verify_sample
from data_prep.places import Place
from data_prep.rows.inputs import split_path
from data_prep.schema import WHOLE_SHARD, Manifest

FIELDS = ("source", "shard", "index", "reason", "message")
AGAIN = "again"  # in a line that counts samples that others name
NOTHING = "nothing is wrong with it now: it was out of reach, or has been mended since"


@dataclass(frozen=True)
class Verdict:
    """What training said of a sample, and what it is like now."""

    place: str  # of the data set; "" when the list names none that is here
    source: str  # as the recipe calls it
    shard: str
    index: int
    key: str  # "" for a shard as a whole and where it cannot be read
    said: str  # reason and message of training
    found: str
    is_bad: bool

    def record(self) -> dict:
        """The verdict as JSON types."""
        return asdict(self)


def read_drops(paths: Sequence[str]) -> list[dict]:
    """The records of the lists of a trainer, on disk or behind URLs, each sample once, in order of shard and index.

    Raises FileNotFoundError for a missing list and ValueError for a line that is none of its records.
    """
    found: dict[tuple, dict] = {}
    for path in paths:
        place, name = split_path(path)
        if not place.exists(name):
            raise FileNotFoundError(f"{path} is missing: name a list of a run, dropped-rank_00000.jsonl")
        for number, line in enumerate(place.read(name).decode("utf-8", "replace").splitlines(), 1):
            record = _record(line)
            if record is not None and AGAIN in record:
                continue
            if record is None:
                raise ValueError(
                    f"{path} line {number} is {line[:80]!r}, it must be an object with {list(FIELDS)}: name a list"
                    " that training wrote, and remove a line that a crash cut off"
                )
            found.setdefault((record["source"], record["shard"], record["index"]), record)
    return [record for _, record in sorted(found.items())]


def _record(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kinds = dict.fromkeys(FIELDS, str) | {"index": int}
    if not isinstance(record, dict):
        return None
    is_good = AGAIN in record or all(type(record.get(name)) is kind for name, kind in kinds.items())
    return record if is_good else None


def judge(drops: Sequence[dict], places: Sequence[Place]) -> list[Verdict]:
    """A verdict of every drop. A drop belongs to the only data set, or to the one whose folder or name is its source;
    where that says nothing, to every one that has a shard of that name."""
    manifests = {place: manifest_at(place) for place in places}
    names = {place: {shard.name for shard in manifest.shards} for place, manifest in manifests.items()}
    verdicts = []
    for drop in drops:
        known = [place for place in places if drop["shard"] in names[place]]
        named = [p for p in known if drop["source"] in (p.name, manifests[p].name)]
        said = f"{drop['reason']}: {drop['message']}"
        where = (drop["source"], drop["shard"], drop["index"])
        if not known:
            verdicts.append(Verdict("", *where, "", said, "no data set here has a shard of that name", True))
        for place in named or known:
            key, found = _look(place, manifests[place], drop["shard"], drop["index"])
            verdicts.append(Verdict(str(place), *where, key, said, found or NOTHING, bool(found)))
    return verdicts


def _look(place: Place, manifest: Manifest, name: str, index: int) -> tuple[str, str]:
    """Key of a sample and what is wrong with it, "" for nothing."""
    try:
        if index == WHOLE_SHARD:
            found = examine_shard(place, manifest, name)
            return "", found[0].problem if found else ""
        sample = read_sample(place, name, index)
    except FileNotFoundError:
        return "", "the shard is missing, the manifest names it"
    except BadDataSet as error:
        return "", str(error)
    try:
        verify_sample(sample[0].key, sample, manifest)
    except BadDataSet as error:
        return sample[0].key, str(error)
    return sample[0].key, ""
