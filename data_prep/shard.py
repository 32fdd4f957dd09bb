"""How does a run of items become one tar shard? The same bytes every time, whole or not at all.

A finished shard is three files: the tar, its index, and a done marker that lets an interrupted build go on.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.samples import Dropped, Made, Sample, members
from data_prep.schema import (
    IMAGE_EXTENSIONS,
    KEY_PATTERN,
    TAR_BLOCK,
    Shard,
    fsync_folder,
    index_bytes,
    index_path,
    sha256_file,
    write_atomic,
)

WORK_FOLDER = ".build"  # inside a data set folder while it is being built
TEMPORARY = ".tmp"  # ending of files that are not finished


@dataclass(frozen=True)
class Work:
    """The items of one shard, and where it goes."""

    folder: str
    number: int
    items: Sequence[Any]
    make: Callable[[Any], Made]


@dataclass(frozen=True)
class Finished:
    """A shard on disk (None when no item of its range was good) and what was left out of it."""

    shard: Shard | None
    num_text: int  # samples with a caption
    num_category: int  # samples with a category
    num_bad: int  # items with anything left out
    dropped: tuple[Dropped, ...]


def shard_name(number: int) -> str:
    """File name of a shard: 7 -> "000007.tar"."""
    return f"{number:06d}.tar"


def build_shard(work: Work, tick: Callable[[], None]) -> Finished:
    """Make the samples of one shard and write it; `tick` is called after every item.

    Names appear only when the content is complete and on disk. Raises OSError (no space left, ...) with nothing left
    behind, and ValueError when a source breaks the contract.
    """
    folder = Path(work.folder)
    path = folder / shard_name(work.number)
    temporary = folder / f"{path.name}.{os.getpid()}{TEMPORARY}"
    dropped: list[Dropped] = []
    keys: set[str] = set()
    offsets = [0]
    num_text = num_category = num_bad = 0
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for item in work.items:
                    made = work.make(item)
                    dropped += made.dropped
                    num_bad += bool(made.dropped)
                    if made.sample is not None:
                        _append(tar, made.sample, keys)
                        offsets.append(tar.offset)
                        num_text += bool(made.sample.captions)
                        num_category += made.sample.category is not None
                    tick()
            file.flush()
            os.fsync(file.fileno())
        shard = None
        if keys:
            shard = Shard(path.name, len(keys), temporary.stat().st_size, sha256_file(temporary))
            write_atomic(index_path(path), index_bytes(offsets))
            os.replace(temporary, path)
            fsync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    finished = Finished(shard, num_text, num_category, num_bad, tuple(dropped))
    write_atomic(marker_path(folder, work.number), json.dumps(asdict(finished)).encode())
    return finished


def marker_path(folder: Path, number: int) -> Path:
    """The file whose existence says that a shard is finished."""
    return folder / WORK_FOLDER / f"{number:06d}.json"


def read_marker(folder: Path, number: int) -> Finished | None:
    """What an earlier run finished under this number, or None when that shard must be built (again)."""
    path = marker_path(folder, number)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    shard = Shard(**record["shard"]) if record["shard"] else None
    if shard is not None:
        tar = folder / shard.name
        is_whole = tar.is_file() and tar.stat().st_size == shard.num_bytes and index_path(tar).is_file()
        if not is_whole or sha256_file(tar) != shard.sha256:
            return None
    dropped = tuple(Dropped(**entry) for entry in record["dropped"])
    return Finished(shard, record["num_text"], record["num_category"], record["num_bad"], dropped)


def _append(tar: tarfile.TarFile, sample: Sample, keys: set[str]) -> None:
    if not KEY_PATTERN.fullmatch(sample.key):
        raise ValueError(f"key {sample.key!r} must match {KEY_PATTERN.pattern}: mend the source")
    if sample.key in keys:
        raise ValueError(f"key {sample.key!r} appears twice in a shard: mend the source")
    if sample.extension not in IMAGE_EXTENSIONS:
        raise ValueError(f"{sample.key}: extension {sample.extension!r} must be one of {IMAGE_EXTENSIONS}")
    keys.add(sample.key)
    for extension, content in members(sample):
        header = tarfile.TarInfo(f"{sample.key}.{extension}")  # mtime, uid and gid are 0
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))
    assert tar.offset % TAR_BLOCK == 0
