"""What does a source hand to the builder? Collections of items, and a pure function from an item to a sample."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Sample:
    """One image with whatever is known about it."""

    key: str  # [A-Za-z0-9_-]+, unique in the data set
    image: bytes  # encoded
    extension: str  # of IMAGE_EXTENSIONS, says the encoding of `image`
    size: tuple[int, int]  # width, height in pixels
    captions: tuple[str, ...] = ()  # the first becomes the .txt
    category: int | None = None
    mask: bytes | None = None  # PNG of instance numbers
    record: Mapping[str, Any] = field(default_factory=dict)  # more for the .json: source, tags, objects, ...


@dataclass(frozen=True)
class Dropped:
    """An input, or one of its captions, that was left out."""

    name: str  # as the source calls it
    reason: str  # one word, counted in the manifest
    detail: str = ""


@dataclass(frozen=True)
class Made:
    """What became of one item."""

    sample: Sample | None
    dropped: tuple[Dropped, ...] = ()


@runtime_checkable
class Releasable(Protocol):
    """A slice of items that holds something, such as downloads, which is not needed once their shard is stored."""

    def release(self) -> None:
        """Let go of it; called when the shard's marker is written, perhaps again, and by another process."""


def release(items: Sequence[Any]) -> None:
    """Tell a slice of items that its shard is stored, if it wants to know."""
    if isinstance(items, Releasable):
        items.release()


@dataclass(frozen=True)
class Collection:
    """One data set to build: `make(items[i])` gives sample i, in any process and any order."""

    name: str
    split: str
    has_split_folder: bool  # it goes into a folder of its split's name even when it is the only one
    categories: tuple[str, ...]
    settings: Mapping[str, Any]  # everything that decides the bytes, JSON types only; goes into the manifest
    items: Sequence[Any]  # only len() and slicing are used; a slice is small, picklable and iterable anywhere
    make: Callable[[Any], Made]  # pure and picklable
    num_bytes: int  # estimate of the finished shards
    tags: tuple[str, ...] = ()  # every name that a sample's record["tags"] can hold
    shard_sizes: Sequence[int] | None = (
        None  # items of each shard, where the input fixes them; None: as asked for
    )
    # called by a builder, and by nobody who only looks, with the items of the shards that it is about to make
    prepare: Callable[[Sequence[range]], None] | None = None


def members(sample: Sample) -> list[tuple[str, bytes]]:
    """The tar members of a sample as (extension, content), image first and .json last.

    The .json holds what the contract of `schema.py` says, and `crc32` of every member but the image (whose
    `sha256` it holds), its own computed without that field, so that `check` can tell which member changed.
    """
    parts = [(sample.extension, sample.image)]
    if sample.captions:
        parts.append(("txt", sample.captions[0].encode("utf-8")))
    if sample.category is not None:
        parts.append(("cls", str(sample.category).encode("ascii")))
    if sample.mask is not None:
        parts.append(("mask.png", sample.mask))
    record = {
        **sample.record,
        "captions": list(sample.captions),
        "size": list(sample.size),
        "sha256": hashlib.sha256(sample.image).hexdigest(),
    }
    checksums = {extension: zlib.crc32(content) for extension, content in parts[1:]}
    parts.append(
        ("json", json_bytes({**record, "crc32": {**checksums, "json": zlib.crc32(json_bytes(record))}}))
    )
    return parts


def json_bytes(record: Mapping[str, Any]) -> bytes:
    """The one spelling of a record: sorted keys, no spaces, UTF-8."""
    return _JSON.encode(record).encode("utf-8")


_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))
