"""Which number and which name has a class of ImageNet? By frozen tables, so that heads match published ones.

`synsets.txt` lists every synset with the tables that hold it and its words in WordNet; it was made from the tables of
timm 1.0.31 (Apache-2.0; `timm/data/_info`), with which a test compares it. Every table numbers its synsets in sorted
order, but two: `22k-ms` begins with the thousand of ImageNet-1k, and `22k-swin` follows the 21,843 of Google's list
with its last two in the places of the two that have no images (so in the maps that Swin and InternImage train with).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("synsets.txt")
MARKS = {  # name of a table -> its letter in synsets.txt
    "22k": "2",  # fall11, 21,841
    "21k-goog": "g",  # 21,843: two without images
    "22k-ms": "m",  # 21,842
    "21k-p-fall11": "p",  # 11,221
    "21k-p-winter21": "w",  # 10,450
    "12k": "k",  # 11,821
    "1k": "1",  # 1,000
}
SWIN = "22k-swin"
CHOICES = (*MARKS, SWIN)


@dataclass(frozen=True)
class Classes:
    """Synsets by class number, and a different name for each."""

    synsets: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def number(self) -> dict[str, int]:
        """Class number of every synset."""
        return {synset: number for number, synset in enumerate(self.synsets)}


def classes_of(table: str) -> Classes:
    """The classes of a published table; ValueError for an unknown one."""
    if table not in CHOICES:
        raise ValueError(f"classes={table!r} is unknown; choose from {list(CHOICES)}")
    return named(_order(table))


def named(synsets: tuple[str, ...]) -> Classes:
    """These synsets with their names; ValueError for one that ImageNet does not have."""
    words, _ = _read()
    if unknown := [synset for synset in synsets if synset not in words]:
        raise ValueError(f"{unknown[:3]} are no synsets of ImageNet: pass ids such as n01440764")
    names = _distinct([words[synset].split(", ")[0] for synset in synsets], list(synsets))
    return Classes(synsets, tuple(names))


def words_of(synset: str) -> str:
    """What WordNet calls a synset: "great white shark, white shark, man-eater"."""
    return _read()[0][synset]


def without_images() -> frozenset[str]:
    """The synsets of Google's list that no archive has images of."""
    return frozenset(_order("21k-goog")) - frozenset(_order("22k"))


def plain_name(name: str) -> str:
    """A name for a sentence, without the id that tells it from its like: "crane (n02012849)" -> "crane"."""
    return re.sub(r" \([^()]*\)$", "", name)


def _order(table: str) -> tuple[str, ...]:
    _, members = _read()
    if table == SWIN:
        *kept, before_last, last = members[MARKS["21k-goog"]]
        with_images = set(members[MARKS["22k"]])
        gaps = [place for place, synset in enumerate(kept) if synset not in with_images]  # 9205 and 15027
        for place, synset in zip(gaps, (before_last, last), strict=True):
            kept[place] = synset
        return tuple(kept)
    if table == "22k-ms":
        first = set(members["1"])
        return (*members["1"], *(synset for synset in members["m"] if synset not in first))
    return tuple(members[MARKS[table]])


@functools.cache
def _read() -> tuple[dict[str, str], dict[str, list[str]]]:
    words: dict[str, str] = {}
    members: dict[str, list[str]] = {mark: [] for mark in MARKS.values()}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        synset, marks, text = line.split("\t")
        words[synset] = text
        for mark in marks:
            members[mark].append(synset)
    return words, members


def _distinct(names: list[str], ids: list[str]) -> list[str]:
    """Names, those that several share with their id."""
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({one})" for name, one in zip(names, ids, strict=True)]
