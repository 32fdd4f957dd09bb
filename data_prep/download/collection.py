"""How does a list of URLs become a collection? A lazy slice a shard, finalised image by image.

The slice reads its raw shard in the worker that builds it, and downloads it there when it is missing; so disk stays
bounded by one raw shard a worker, and any engine that runs the workers runs the downloads too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.download.blocked import Blocked, blocked_by
from data_prep.download.options import Download, require_engine
from data_prep.download.store import Item, Store
from data_prep.download.table import Row, Table
from data_prep.images import check_image
from data_prep.limits import BadImage, Limits
from data_prep.samples import Collection, Dropped, Made, Sample

Described = tuple[tuple[str, ...], int | None, Mapping[str, Any]]  # captions, category, record
Describe = Callable[[Row], Described]
MEAN_BYTES = (
    60_000  # of a finished sample, for the estimate of the disk: LAION at 256 to 384 pixels takes less
)


@Sequence.register  # of which the builder uses len and slices
@dataclass(frozen=True)
class LazyRows:
    """Rows [start, stop) of a download as a sequence of items; slices of it are cheap, picklable and lazy."""

    store: Store
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, place: slice) -> LazyRows:
        if not isinstance(place, slice):
            raise TypeError(f"rows[{place!r}] must be a slice: a row alone would cost a whole raw shard")
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step} of a slice of rows must be 1: slice without a step")
        return LazyRows(self.store, self.start + start, self.start + max(start, stop))

    def __iter__(self) -> Iterator[Item]:
        for first, count in self._pieces():
            yield from self.store.items(first, count)

    def release(self) -> None:
        """Remove the raw files of these rows, whose shards are stored."""
        for first, count in self._pieces():
            self.store.release(first, count)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of these rows in every raw shard."""
        size = self.store.options.raw_shard_size
        first = self.start
        while first < self.stop:
            end = min((first // size + 1) * size, self.stop)
            yield first, end - first
            first = end


@dataclass(frozen=True)
class Finalise:
    """One item becomes one sample, or a Dropped with its reason: pure and picklable."""

    describe: Describe
    limits: Limits
    blocked: Blocked | None = None

    def __call__(self, item: Item) -> Made:
        row = item.row
        if item.content is None:
            return _dropped(row, item.reason, item.detail)
        if self.blocked and (known := self.blocked.found(item.content)):
            return _dropped(row, "blocked_hash", known)
        if wrong := _wrong_hash(row, item.content):
            return _dropped(row, "hash_mismatch", wrong)
        try:
            checked = check_image(item.content, self.limits)
        except BadImage as error:
            return _dropped(row, error.reason, error.detail)
        if self.blocked and checked.changed and (known := self.blocked.found(checked.content)):
            return _dropped(row, "blocked_hash", f"{known}, as it would be stored")
        captions, category, record = self.describe(row)
        ours = {"url": row.url, "phash": checked.phash}
        if checked.changed:
            ours["changed"] = checked.changed
        return Made(
            Sample(
                row.key, checked.content, checked.extension, checked.size, tuple(captions), category,
                record={**ours, **record},
            )
        )  # fmt: skip


def downloaded(
    rows: Any,
    work: Path,
    options: Download,
    describe: Describe,
    *,
    name: str,
    split: str,
    settings: Mapping[str, Any],
    block_hashes: Sequence[str] = (),
    categories: Sequence[str] = (),
    tags: Sequence[str] = (),
    has_split_folder: bool = False,
) -> Collection:
    """The images of normalised rows (`data_prep.rows.Rows`) as a collection, in the order of the rows.

    `work` is a local folder that survives interruptions. `block_hashes` are files of sha256 or md5, one a line: an
    image with one of them is left out, whether it has it as it was served or as it would be stored. Nothing is
    downloaded here: with `options.ahead` all that a builder lacks is when it begins, else each shard when it is
    built. Every row comes out: as a sample, or as a Dropped whose reason is one of `fetch`, `check_image`,
    `hash_mismatch`, `blocked_hash` or `quarantined`. Raises ModuleNotFoundError (no engine), ValueError (another list
    or shard size in `work`, a line that is no hash) and FileExistsError (foreign files); building raises OSError (no
    space left, an outage).
    """
    require_engine(options)
    store = Store(Path(work).resolve(), Table.of(rows), options)
    store.claim()
    blocked = blocked_by(block_hashes, store.work) if block_hashes else None
    num_rows = len(store.table)
    first_to_last = [store.span(number)[1] for number in range(len(store))]
    return Collection(
        name=name,
        split=split,
        has_split_folder=has_split_folder,
        categories=tuple(categories),
        settings={**settings, "download": _deciding(store, blocked)},
        items=LazyRows(store, 0, num_rows),
        make=Finalise(describe, options.limits, blocked),
        num_bytes=MEAN_BYTES * num_rows,
        tags=tuple(tags),
        shard_sizes=first_to_last,
        prepare=store.ahead if options.ahead else None,
    )


def _deciding(store: Store, blocked: Blocked | None) -> dict[str, Any]:
    """The settings that decide which images are good; how fast or how often we try is no part of a data set."""
    return {
        **({"blocked": blocked.identity} if blocked else {}),
        "rows": store.table.identity,
        "raw_shard_size": store.options.raw_shard_size,
        "limits": asdict(store.options.limits),
    }


def _wrong_hash(row: Row, content: bytes) -> str:
    """What differs from the published hashes; "" when nothing does, or none was published."""
    for algorithm, published in (("sha256", row.sha256), ("md5", row.md5)):
        if published:
            found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
            if found != published.lower():
                return f"{algorithm} {found}, published {published}"
    return ""


def _dropped(row: Row, reason: str, detail: str) -> Made:
    return Made(None, (Dropped(row.key, reason, f"{row.url[:200]} {detail}".strip()),))
