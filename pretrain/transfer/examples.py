"""What is one annotated image, and when are too many of them left out?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor

from pretrain.data.decode import decode_image
from pretrain.data.faults import BadSample, beyond_chance
from pretrain.transfer.formats import FEW

IGNORED = 255  # number of pixels that are neither taught nor judged
LOOKED_AT = 200  # examples of a set that are read before anything is trained


@dataclass(frozen=True)
class Example:
    """An image as it is stored, and what is said of it."""

    image: UInt8[Tensor, "3 h w"]
    index: int  # in its set
    classes: UInt8[Tensor, "h w"] | None = None  # number of a name, or IGNORED; for segmentation
    things: tuple[
        Mapping[str, Any], ...
    ] = ()  # annotations in COCO's format, pixels of this image; for detection


@dataclass(frozen=True)
class Federation:
    """What a set like LVIS says of things that are absent; its other absent categories are unknown.

    Source: arXiv 1908.03195, section 2.
    """

    negative: Mapping[int, frozenset[int]]  # by image: categories of which it shows nothing
    not_exhaustive: Mapping[int, frozenset[int]]  # by image: categories of which not all things are annotated
    frequency: Mapping[int, str]  # by category, of its training images: r(are), c(ommon) or f(requent)


@runtime_checkable
class AnnotatedSet(Protocol):
    """A data set with random access. `example` raises BadSample for what cannot be used."""

    names: tuple[str, ...]  # of the classes, in the order of their numbers
    category_ids: tuple[int, ...]  # of the annotations, in the order of the names; for detection
    image_ids: tuple[int, ...]  # as the set numbers its images
    has_masks: bool  # do all things have outlines?
    federation: Federation | None  # None: a category without annotations is absent from an image
    place: Path  # as it was named
    sha256: str  # of what tells its images and annotations apart from others
    files: Mapping[str, str]  # that hold its images, as `require_apart` takes them
    dropped: Mapping[str, int]  # what was left out when it was opened, by reason
    shown: Sequence[frozenset[int]] | None  # by example: classes that it teaches; None: not known unread

    def __len__(self) -> int: ...

    def example(self, index: int) -> Example: ...


def shown_in(examples: AnnotatedSet) -> Sequence[frozenset[int]]:
    """Classes of every example; ValueError for a set that would have to be read for them."""
    if examples.shown is None:
        raise ValueError(
            f"{examples.place} has no file that lists the classes of its images, by which the recipe treats rare "
            "ones better: name a set in LVIS's or COCO's format, or take --recipe coco"
        )
    return examples.shown


def read_image(path: Path) -> UInt8[Tensor, "h w 3"]:
    """RGB pixels of a file; BadSample names it."""
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise BadSample("unreadable", f"{path}: {error}") from error
    except BadSample as error:
        raise BadSample(error.reason, f"{path}: {error}") from error


def repeated(names: Iterable[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


@dataclass
class Drops:
    """What is left out of one set: counts and the first message by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, message: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, message)

    def require_few(self, what: str, total: int, limit: float) -> None:
        """ValueError when more than a share of `limit` of `total`, or of FEW where those are more, is left out."""
        num_bad = sum(self.counts.values())
        allowed = int(limit * max(total, FEW))
        if num_bad <= allowed:
            return
        reasons = "; ".join(
            f"{reason} {self.counts[reason]}, first: {self.first[reason]}" for reason in sorted(self.counts)
        )
        raise ValueError(
            f"{what}: {num_bad} of {total} cannot be used ({reasons}), and --max-bad {limit} allows {allowed}: mend "
            "them, or raise --max-bad"
        )


def look_at(examples: AnnotatedSet, what: str, max_bad: float) -> None:
    """Reads examples spread over a set, so that a fault of it is told before hours of training and not after.

    All of a small set are read. ValueError when more of them cannot be used than `max_bad` lets through; by more
    than chance, where they are not all.
    """
    number = min(len(examples), LOOKED_AT)
    drops = Drops()
    for place in range(number):
        try:
            examples.example(place * len(examples) // number)
        except BadSample as error:
            drops.add(error.reason, str(error))
    if number == len(examples) or sum(drops.counts.values()) > beyond_chance(max_bad, number):
        drops.require_few(what, number, max_bad)
