"""What does a shard hold, in counts that add up over shards?"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from data_prep.doctor.finished import BadDataSet
from data_prep.doctor.members import Member, samples_of
from data_prep.doctor.perceptual import recorded_hash, stored_image
from data_prep.limits import BadImage
from data_prep.places import Place

OWN_FIELDS = (
    "captions",
    "size",
    "sha256",
    "crc32",
    "tags",
    "objects",
    "category",
    "phash",
)  # told by themselves
MOST_TEXTS = 100  # different values of a text field of the records that are counted; more are called many
LONGEST_TEXT = 80  # characters of a value that is counted
ONE_BIN = 64  # steps a doubling in histograms of bytes


@dataclass
class Values:
    """What stands in one more field of the records."""

    count: int = 0  # samples that have it, null included
    missing: int = 0  # of these, null
    numbers: Counter[float] = field(default_factory=Counter)  # three significant digits -> samples
    texts: Counter[str] | None = field(default_factory=Counter)  # None: more than MOST_TEXTS different ones
    other: int = 0  # lists and objects

    def add(self, value: Any) -> None:
        """Count one value."""
        self.count += 1
        if value is None:
            self.missing += 1
        elif isinstance(value, bool | str):
            if self.texts is not None:
                self.texts[str(value)[:LONGEST_TEXT]] += 1
                self._bound()
        elif isinstance(value, int | float):
            self.numbers[float(f"{value:.3g}")] += 1
        else:
            self.other += 1

    def merge(self, other: Values) -> None:
        """Add what another has counted."""
        self.count += other.count
        self.missing += other.missing
        self.other += other.other
        self.numbers.update(other.numbers)
        if self.texts is not None and other.texts is not None:
            self.texts.update(other.texts)
            self._bound()
        else:
            self.texts = None

    def _bound(self) -> None:
        if self.texts is not None and len(self.texts) > MOST_TEXTS:
            self.texts = None


@dataclass
class Summary:
    """Counts of some samples. Every Counter is value -> number of samples, or of captions or tags."""

    formats: Counter[str] = field(default_factory=Counter)  # extension of a member
    widths: Counter[int] = field(default_factory=Counter)  # pixels
    heights: Counter[int] = field(default_factory=Counter)  # pixels
    image_bytes: Counter[int] = field(default_factory=Counter)  # to one part in ONE_BIN
    captions: Counter[int] = field(default_factory=Counter)  # a sample
    words: Counter[int] = field(default_factory=Counter)  # a caption
    characters: Counter[int] = field(default_factory=Counter)  # a caption
    objects: Counter[int] = field(default_factory=Counter)  # a sample
    tags_a_sample: Counter[int] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)  # samples with it
    scores: Counter[float] = field(default_factory=Counter)  # of tags, two digits
    categories: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)  # of the captions that were looked at
    fields: dict[str, Values] = field(default_factory=dict)  # what else the records hold
    num_computed: int = 0  # perceptual hashes that no record held

    def merge(self, other: Summary) -> None:
        """Add what another has counted."""
        for name, mine, theirs in (
            (f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        ):
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, int):
                setattr(self, name, mine + theirs)
        for name, values in other.fields.items():
            self.fields.setdefault(name, Values()).merge(values)


@dataclass(frozen=True)
class Task:
    """A shard to read, and what to look at."""

    place: Place
    shard: str
    with_summary: bool
    with_phash: bool  # from the record, or from the pixels where it has none
    num_languages: int = 0  # captions to identify
    num_chosen: int = 0  # samples for pictures


@dataclass(frozen=True)
class Seen:
    """What a shard holds. Arrays are of its samples, in order."""

    summary: Summary
    sha256: np.ndarray  # uint64, the first 64 bits of each stored image
    phash: np.ndarray  # uint64; empty when not asked for
    chosen: tuple[
        tuple[int, int], ...
    ]  # hash of a key and number in the shard of a random few, the least hashes


def look(task: Task, tick: Callable[[], None]) -> Seen:
    """Read a shard once; BadDataSet names the shard and what is wrong with it."""
    summary = Summary()
    exact, perceptual = [], []
    keyed: list[tuple[int, int]] = []
    captions: list[tuple[int, str]] = []
    try:
        with task.place.open(task.shard) as file:
            for number, (key, sample) in enumerate(samples_of(file)):
                record = _record(sample[-1])
                exact.append(int(record["sha256"][:16], 16))
                if task.with_phash:
                    perceptual.append(_phash(sample[0], record, summary))
                if task.with_summary:
                    order = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
                    keyed.append((order, number))
                    captions += [(order, caption) for caption in record["captions"][:1]]
                    _count(summary, sample, record)
                tick()
    except (BadDataSet, FileNotFoundError, KeyError, ValueError, RecursionError) as error:
        raise BadDataSet(
            f"{task.place}/{task.shard}: {error}: run `python -m data_prep check {task.place}` for all that is wrong"
        ) from error
    for _, caption in sorted(captions)[: task.num_languages]:
        summary.languages[_language(caption)] += 1
    chosen = tuple(sorted(keyed)[: task.num_chosen])
    return Seen(summary, np.array(exact, np.uint64), np.array(perceptual, np.uint64), chosen)


def _record(member: Member) -> dict[str, Any]:
    record = json.loads(member.content) if member.extension == "json" else None
    if not isinstance(record, dict):
        raise BadDataSet(f"member {member.name}: a .json must end every sample")
    return record


def _phash(image: Member, record: dict[str, Any], summary: Summary) -> int:
    recorded = recorded_hash(record)
    if recorded is not None:
        return recorded
    summary.num_computed += 1
    try:
        return int(stored_image(image.content).phash, 16)
    except BadImage as error:
        raise BadDataSet(f"member {image.name}: training cannot use it ({error})") from error


def _count(summary: Summary, sample: list[Member], record: dict[str, Any]) -> None:
    summary.formats.update(member.extension for member in sample if member.extension != "json")
    width, height = record["size"]
    summary.widths[width] += 1
    summary.heights[height] += 1
    summary.image_bytes[_rounded(len(sample[0].content))] += 1
    summary.captions[len(record["captions"])] += 1
    for caption in record["captions"]:
        summary.words[len(caption.split())] += 1
        summary.characters[len(caption)] += 1
    summary.objects[len(record.get("objects", []))] += 1
    tags = record.get("tags", [])
    summary.tags_a_sample[len(tags)] += 1
    for name, score in tags:
        summary.tags[name] += 1
        summary.scores[round(score, 2)] += 1
    if "category" in record:
        summary.categories[record["category"]] += 1
    for name, value in record.items():
        if name in OWN_FIELDS:
            continue
        inside = value.items() if isinstance(value, dict) else ()  # one level, for columns of the input
        for inner, one in [(f"{name}.{inner}", one) for inner, one in inside] or [(name, value)]:
            summary.fields.setdefault(inner, Values()).add(one)


def _rounded(value: int) -> int:
    """A size to one part in ONE_BIN, so that a histogram of sizes stays short."""
    step = max(1, 1 << max(0, value.bit_length() - ONE_BIN.bit_length()))
    return value // step * step


def _language(caption: str) -> str:
    import py3langid  # loads a model of a megabyte or two, which only this needs

    return py3langid.classify(caption)[0]
