"""What does a data set on disk hold, and what does its manifest.json promise?

A data set is a folder: `manifest.json`, shards `000000.tar`, `000001.tar`, ... each with an index
`000000.tar.idx`, and `tokenizer/` when its samples have captions. A sample is a run of adjacent tar members
that share a key, image first: `<key>.{jpg,png,webp}` [+ `.txt` caption, UTF-8] [+ `.cls` category number, ASCII]
[+ `.mask.png` instance numbers, 0 = background] + `.json`, whose `tags` are [[name, confidence in [0, 1]], ...]
with names of the manifest's `tags`. Standard library only: training imports this file, `labels.py`, `files.py`,
`masks.py` and `index.py`, by which an index is read.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import no_file, write_atomic

SCHEMA_VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "png", "webp")  # of the first member of a sample
MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
WHOLE_SHARD = -1  # where an index of a sample is told: all of the shard
TAR_BLOCK = 512  # bytes; every tar header starts at a multiple of it
SAMPLE_BYTES = 2 * TAR_BLOCK  # of a shard that a sample takes at least: its image's header, and a block of it
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One tar file of a data set, as the manifest records it."""

    name: str  # file name inside the folder, "000000.tar"
    num_samples: int
    num_bytes: int  # size of the tar file
    sha256: str  # of the tar file, lower-case hexadecimal
    num_items: int | None = None  # inputs that it was made from; None where the builder did not count them
    dropped: Mapping[str, int] = field(
        default_factory=dict, hash=False
    )  # reason -> number left out of this shard

    def __post_init__(self) -> None:
        if not _SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"shard name {self.name!r} must match {_SHARD_NAME.pattern}: build it again")
        if not _is_count(self.num_samples) or self.num_samples < 1:
            raise ValueError(f"{self.name}: num_samples={self.num_samples!r} must be a positive integer")
        if not _is_count(self.num_bytes) or self.num_bytes % TAR_BLOCK or not self.num_bytes:
            raise ValueError(
                f"{self.name}: num_bytes={self.num_bytes!r} must be a positive multiple of {TAR_BLOCK}"
            )
        if self.num_samples * SAMPLE_BYTES > self.num_bytes:
            raise ValueError(
                f"{self.name}: num_samples={self.num_samples} must be at most {self.num_bytes // SAMPLE_BYTES}: each "
                f"takes {SAMPLE_BYTES} of its {self.num_bytes} bytes or more"
            )
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self.name}: sha256={self.sha256!r} must be 64 lower-case hexadecimal digits")
        self._require_counts()

    def _require_counts(self) -> None:
        if not isinstance(self.dropped, Mapping) or not all(map(_is_count, self.dropped.values())):
            raise ValueError(f"{self.name}: dropped={self.dropped!r} must count reasons: build it again")
        if self.num_items is None:
            return
        if not _is_count(self.num_items) or self.num_items < self.num_samples:
            raise ValueError(
                f"{self.name}: num_items={self.num_items!r} must be a number not below its {self.num_samples} "
                "samples: build it again"
            )
        lost, told = self.num_items - self.num_samples, sum(self.dropped.values())
        if lost > told:
            raise ValueError(
                f"{self.name}: {lost} of {self.num_items} items gave no sample, but only {told} are told in dropped: "
                "every one needs a reason: build it again"
            )


@dataclass(frozen=True)
class Manifest:
    """What a data set holds: written last, read first."""

    name: str  # of the data set, "scenes"
    split: str  # "train", "heldout", "val", ...
    categories: tuple[str, ...]  # name of category i at position i; empty without categories
    num_samples: int
    has_text: bool  # every sample has a .txt
    has_category: bool  # every sample has a .cls
    shards: tuple[Shard, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> number of inputs left out
    builder: Mapping[str, Any] = field(
        default_factory=dict
    )  # the settings that produced it, without paths of output
    tags: tuple[str, ...] = ()  # every name that tags of samples have; empty: the tags are not promised
    num_items: int | None = (
        None  # inputs of the whole, also those of shards without a good one; None: not counted
    )
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise ValueError(
                f"schema={self.schema!r} of data set {self.name!r} must be {SCHEMA_VERSION}, what this code reads:"
                " build it again with this version"
            )
        if not self.shards:
            raise ValueError(
                f"data set {self.name!r} has no shards: build it again, with at least one good sample"
            )
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError(f"data set {self.name!r} names a shard twice: build it again")
        total = sum(shard.num_samples for shard in self.shards)
        if self.num_samples != total:
            raise ValueError(
                f"num_samples={self.num_samples!r} of data set {self.name!r} must equal the {total} of its shards:"
                " build it again"
            )
        if self.has_category and not self.categories:
            raise ValueError(f"data set {self.name!r} has_category but lists no categories: build it again")
        told = sum(shard.num_items or 0 for shard in self.shards)
        if self.num_items is not None and (not _is_count(self.num_items) or self.num_items < told):
            raise ValueError(
                f"num_items={self.num_items!r} of data set {self.name!r} must be a number not below the {told} of "
                "its shards: build it again"
            )
        for kind, named in (("category", self.categories), ("tag", self.tags)):
            if len(set(named)) != len(named):
                (twice, _), *_ = Counter(named).most_common(1)
                raise ValueError(
                    f"data set {self.name!r} names a {kind} twice, {twice!r}: each needs a name of its own, build it "
                    "again"
                )

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Manifest:
        """The manifest of the data set in `folder`, validated; shard files must exist with the recorded size.

        Raises FileNotFoundError (no folder, manifest, shard or index) and ValueError (anything that contradicts
        the schema). It reads no shard: `python -m data_prep check` does.
        """
        folder = Path(folder)
        manifest = parse_manifest(folder)
        for shard in manifest.shards:
            require_shard(folder, shard)
        return manifest


def parse_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of the data set in `folder`, validated in itself; the shards are not looked at."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(_missing_manifest(Path(folder)))
    try:
        return manifest_from_json(path.read_bytes())
    except (ValueError, TypeError) as error:
        remedy = "" if "build it again" in str(error) else "; build it again"
        raise ValueError(f"{path} is not a manifest: {error}{remedy}") from error


def manifest_from_json(content: bytes) -> Manifest:
    """The typed manifest that a manifest.json holds; raises ValueError or TypeError naming the field at fault."""
    try:
        return _from_record(json.loads(content.decode("utf-8")))
    except RecursionError as error:
        raise ValueError("its lists and objects lie too deep in one another") from error


def _from_record(record: Any) -> Manifest:
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} found where a JSON object must stand")
    kinds = {
        "schema": int,
        "name": str,
        "split": str,
        "categories": list,
        "num_samples": int,
        "has_text": bool,
        "has_category": bool,
        "shards": list,
        "dropped": dict,
        "builder": dict,
        "tags": list,
    }
    record = {"tags": [], **record}  # manifests that were written before there were tags stay what they are
    num_items = record.pop("num_items", None)  # so do those from before items were counted
    if missing := sorted(kinds.keys() - record.keys()):
        raise ValueError(f"fields {missing} are missing")
    if unknown := sorted(record.keys() - kinds.keys()):
        raise ValueError(f"fields {unknown} are unknown to schema {SCHEMA_VERSION}")
    for name, kind in kinds.items():
        if type(record[name]) is not kind:
            raise ValueError(f"{name}={record[name]!r} must be of type {kind.__name__}")
    for field_name in ("categories", "tags"):
        if not all(isinstance(name, str) for name in record[field_name]):
            raise ValueError(f"{field_name} must be names (strings)")
    typed = {
        "num_items": num_items,
        "categories": tuple(record["categories"]),
        "tags": tuple(record["tags"]),
        "shards": tuple(Shard(**shard) for shard in record["shards"]),
    }
    return Manifest(**{**record, **typed})


def counts_by_reason(manifest: Manifest) -> dict[str, int]:
    """What was left out of all shards that there are, by reason; less than `dropped` where some had no sample."""
    counts: Counter[str] = Counter()
    for shard in manifest.shards:
        counts.update(shard.dropped)
    return dict(sorted(counts.items()))


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `folder`/manifest.json whole or not at all."""
    write_atomic(Path(folder) / MANIFEST_NAME, manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of a manifest.json; the same manifest gives the same bytes, one without counts those of before."""
    record = asdict(manifest)
    for counted in (record, *record["shards"]):
        if counted["num_items"] is None:
            del counted["num_items"]
    for shard in record["shards"]:
        if "num_items" not in shard and not shard["dropped"]:
            del shard["dropped"]
    return (json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _missing_manifest(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder: name a data set folder made by `python -m data_prep build`"
    inside = sorted(entry.name for entry in folder.iterdir() if (entry / MANIFEST_NAME).is_file())
    if inside:
        return f"{folder / MANIFEST_NAME} is missing, but {inside} below it are data sets: name one of them"
    return f"{folder / MANIFEST_NAME} is missing (it is written last): run the same `data_prep build` again"


def require_shard(folder: Path, shard: Shard) -> None:
    """FileNotFoundError unless the shard is a file in `folder`, ValueError when its size is not the manifest's."""
    path = folder / shard.name  # its index may be missing: readers make one
    if not path.is_file():
        raise FileNotFoundError(
            f"{no_file(path)}, the manifest names it: copy it again or build the data set again"
        )
    size = path.stat().st_size
    if size != shard.num_bytes:
        raise ValueError(
            f"{path} has {size} bytes, the manifest says {shard.num_bytes}: copy or build it again"
            f" (`python -m data_prep check {folder}` names what is broken)"
        )
