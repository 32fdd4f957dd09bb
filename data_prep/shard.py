"""How does a run of items become one tar shard? The same bytes every time, whole or not at all.

It is made in a folder on this machine and then put where the data set lies. A finished shard is three files: the tar,
its index, and last a marker that lets an interrupted build go on; what was left out of it lies beside the marker.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_prep.claim import WORK_FOLDER, Require, unclaimed
from data_prep.index import index_bytes
from data_prep.places import TEMPORARY, Entry, Place, place_of
from data_prep.samples import Dropped, Made, Sample, members, release
from data_prep.schema import IMAGE_EXTENSIONS, KEY_PATTERN, TAR_BLOCK, Shard
from data_prep.tar_header import tar_header

MARKERS_AT_ONCE = 16  # requests that a store answers meanwhile


@dataclass(frozen=True)
class Work:
    """The items of one shard, where it is made and where it goes; can be sent to any machine."""

    place: str  # folder or URL of the data set
    folder: str  # on the disk of whoever builds it
    number: int
    items: Sequence[Any]
    make: Callable[[Any], Made]
    require: Require = unclaimed  # called before anything is put


@dataclass(frozen=True)
class Finished:
    """A shard where it belongs (None when no item of its range was good) and counts of what was left out of it."""

    shard: Shard | None
    state: str  # of the tar there, as a listing tells it
    index_sha256: str  # of its index; "" without a shard
    num_text: int  # samples with a caption
    num_category: int  # samples with a category
    num_items: int
    num_bad: int  # items with anything left out
    dropped: Mapping[str, int]  # reason -> how many


def shard_name(number: int) -> str:
    """File name of a shard: 7 -> "000007.tar"."""
    return f"{number:06d}.tar"


def build_shard(work: Work, tick: Callable[[], None]) -> Finished:
    """Make the samples of one shard and put it; `tick` is called after every item.

    Names appear only when the content is complete. Raises OSError (no space left, claim lost, ...) with nothing left
    behind, and ValueError when a source breaks the contract.
    """
    place, folder, name = place_of(work.place), Path(work.folder), shard_name(work.number)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{name}.{os.getpid()}{TEMPORARY}"
    try:
        made = _write_tar(temporary, work, tick)
        work.require()
        reasons = dict(sorted(Counter(drop.reason for drop in made.dropped).items()))
        shard, state, index_sha256 = None, "", ""
        if len(made.offsets) > 1:
            size, digest = temporary.stat().st_size, made.digest.hexdigest()
            shard = Shard(name, len(made.offsets) - 1, size, digest, made.num_items, reasons)
            index = index_bytes(made.offsets)
            index_sha256 = hashlib.sha256(index).hexdigest()
            place.write(f"{name}.idx", index)
            place.move(name, temporary)
            state = place.entry(name).state
    finally:
        temporary.unlink(missing_ok=True)
    if made.dropped:
        place.write(dropped_name(work.number), _lines(made.dropped))
    counts = (made.num_text, made.num_category, made.num_items, made.num_bad)
    finished = Finished(shard, state, index_sha256, *counts, reasons)
    place.write(marker_name(work.number), json.dumps(asdict(finished)).encode())
    release(work.items)
    return finished


@dataclass
class _Tally:
    """What a tar that is being written holds so far."""

    offsets: list[int]  # bytes, of every sample and of the end
    dropped: list[Dropped]
    digest: Any = field(default_factory=hashlib.sha256)  # of its bytes
    num_items: int = 0
    num_text: int = 0
    num_category: int = 0
    num_bad: int = 0


def _write_tar(path: Path, work: Work, tick: Callable[[], None]) -> _Tally:
    """Write all good samples of the items to `path`, flushed."""
    tally, keys = _Tally([0], []), set()
    with open(path, "wb") as file:
        for item in work.items:
            made = work.make(item)
            tally.num_items += 1
            tally.dropped += made.dropped
            tally.num_bad += bool(made.dropped)
            if made.sample is not None:
                blocks = _blocks(made.sample, keys)
                file.write(blocks)
                tally.digest.update(blocks)
                tally.offsets.append(tally.offsets[-1] + len(blocks))
                tally.num_text += bool(made.sample.captions)
                tally.num_category += made.sample.category is not None
            tick()
        end = (
            tally.offsets[-1] + 2 * TAR_BLOCK
        )  # two empty blocks, and whole records as tar programs write them
        blocks = bytes(2 * TAR_BLOCK + -end % tarfile.RECORDSIZE)
        file.write(blocks)
        tally.digest.update(blocks)
        file.flush()
        os.fsync(file.fileno())
    return tally


def marker_name(number: int) -> str:
    """The file whose existence says that a shard is finished."""
    return f"{WORK_FOLDER}/{number:06d}.json"


def dropped_name(number: int) -> str:
    """The file that names what was left out of a shard; missing when that is nothing."""
    return f"{WORK_FOLDER}/{number:06d}.dropped.jsonl"


def finished_shards(place: Place, numbers: Iterable[int]) -> dict[int, Finished]:
    """What earlier runs finished of these shards, by number; a shard that was damaged since is not among them."""
    listed, marked = place.listed(), place.child(WORK_FOLDER).listed()
    there = [number for number in numbers if Path(marker_name(number)).name in marked]

    def look(number: int) -> Finished | None:
        finished = _from_record(json.loads(place.read(marker_name(number))))
        return finished if finished is not None and _is_whole(place, finished, listed) else None

    with ThreadPoolExecutor(1 if place.local is not None else MARKERS_AT_ONCE) as pool:
        found = dict(zip(there, pool.map(look, there), strict=True))
    return {number: finished for number, finished in found.items() if finished is not None}


def changed_shards(place: Place, finished: Mapping[int, Finished]) -> list[int]:
    """Numbers of finished shards that are no longer what was put, such as after another builder's."""
    listed = place.listed()
    with ThreadPoolExecutor(1 if place.local is not None else MARKERS_AT_ONCE) as pool:
        are_whole = pool.map(lambda done: _is_whole(place, done, listed), finished.values())
        return [number for number, is_whole in zip(finished, are_whole, strict=True) if not is_whole]


def _from_record(record: dict[str, Any]) -> Finished | None:
    """What a marker says; None for one of an older version, whose shard is built again."""
    if record.keys() != {one.name for one in fields(Finished)}:
        return None
    shard = Shard(**record["shard"]) if record["shard"] else None
    return Finished(**{**record, "shard": shard})


def _is_whole(place: Place, finished: Finished, listed: Mapping[str, Entry]) -> bool:
    """Whether a shard and its index are still what was put; the tar is read where the listing does not say so."""
    shard = finished.shard
    if shard is None:
        return True
    entry, index = listed.get(shard.name), f"{shard.name}.idx"
    if entry is None or entry.size != shard.num_bytes or index not in listed:
        return False
    if hashlib.sha256(place.read(index)).hexdigest() != finished.index_sha256:
        return False
    if entry.state and entry.state == finished.state:
        return True
    with place.open(shard.name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def _lines(dropped: Sequence[Dropped]) -> bytes:
    return b"".join(
        json.dumps(asdict(drop), ensure_ascii=True, sort_keys=True).encode() + b"\n" for drop in dropped
    )


def _blocks(sample: Sample, keys: set[str]) -> bytes:
    """The members of a sample as they stand in a tar, each a header and its content in whole blocks."""
    if not KEY_PATTERN.fullmatch(sample.key):
        raise ValueError(f"key {sample.key!r} must match {KEY_PATTERN.pattern}: mend the source")
    if sample.key in keys:
        raise ValueError(f"key {sample.key!r} appears twice in a shard: mend the source")
    if sample.extension not in IMAGE_EXTENSIONS:
        raise ValueError(f"{sample.key}: extension {sample.extension!r} must be one of {IMAGE_EXTENSIONS}")
    keys.add(sample.key)
    pieces: list[bytes] = []
    for extension, content in members(sample):
        pieces += (
            tar_header(f"{sample.key}.{extension}", len(content)),
            content,
            bytes(-len(content) % TAR_BLOCK),
        )
    blocks = b"".join(pieces)
    assert len(blocks) % TAR_BLOCK == 0
    return blocks
