"""How are millions of images found inside archives handed to the builder? As one parquet table in the final order.

A collection's items are slices of that table: a worker reads the rows of its shard, then each image by one positioned
read. So no list of them is ever in memory, shards are independent, and the order is any the table was written in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.images import check_image
from data_prep.limits import BadImage, Limits
from data_prep.samples import Dropped, Made, Sample
from data_prep.sources.listing import FileRef, unreadable

ROW_GROUP = 4096  # rows; a worker reads whole groups
OVERHEAD = 5 * 1024  # bytes; tar headers, padding and .json of a sample, for the estimate
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("name", pa.string()),  # as the source calls it
        ("archive", pa.string()),  # path or URL; null: the image is not there
        ("offset", pa.int64()),  # bytes
        ("num_bytes", pa.int64()),
        ("category", pa.int32()),
        ("extra", pa.string()),  # JSON: more for the record
        ("refused", pa.string()),  # a reason to leave it out; null: none
    ]
)


@dataclass(frozen=True)
class Item:
    """One image in an archive, not read yet; fields as in SCHEMA."""

    key: str
    name: str
    archive: str | None
    offset: int | None
    num_bytes: int | None
    category: int | None
    extra: str | None
    refused: str | None


@dataclass(frozen=True)
class Items(Sequence):
    """Rows [start, stop) of a table; a slice is as small, whatever its length."""

    path: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"step={step} of a slice of items must be 1: take every item of a range")
            return Items(self.path, self.start + start, self.start + max(start, stop))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return next(iter(self[index % len(self) : index % len(self) + 1]))

    def __iter__(self) -> Iterator[Item]:
        with pq.ParquetFile(self.path) as file:
            first = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                start, stop = max(self.start - first, 0), min(self.stop - first, num_rows)
                if start < stop:
                    for row in file.read_row_group(group)[start:stop].to_pylist():
                        yield Item(**row)
                first += num_rows


def write_items(relation: duckdb.DuckDBPyRelation, path: Path, prefix: str) -> Items:
    """The rows of a relation with the columns of SCHEMA but the key, in their order, as the table `path`.

    Keys number them. Whole or not at all under that name.
    """
    num_rows = 0
    temporary = path.with_name(path.name + ".tmp")
    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for batch in relation.to_arrow_reader(16 * ROW_GROUP):
            table = pa.Table.from_batches([batch])
            keys = [f"{prefix}-{number:09d}" for number in range(num_rows, num_rows + table.num_rows)]
            table = table.add_column(0, "key", pa.array(keys, pa.string())).cast(SCHEMA)
            writer.write_table(table, ROW_GROUP)
            num_rows += table.num_rows
    os.replace(temporary, path)
    return items_in(path)


def items_in(path: Path) -> Items:
    """All items of a table that `write_items` made."""
    return Items(str(path), 0, pq.read_metadata(path).num_rows)


def make_picked(
    item: Item,
    *,
    source: str,
    categories: Sequence[str],
    captions: Mapping[int, tuple[str, ...]],
    limits: Limits,
) -> Made:
    """The sample of one item, or why there is none. `captions`: those of a category, by its number.

    Raises OSError when the disk or the store fails: only an image that its archive holds but a part of is left out.
    """
    if item.refused is not None:
        return Made(None, (Dropped(item.name, item.refused),))
    if item.archive is None:
        return Made(None, (Dropped(item.name, "missing_image", "named in the list, not in the archives"),))
    try:
        piece = FileRef(item.archive, item.offset, min(item.num_bytes, limits.max_bytes + 1))
        content = piece.read()
        if len(content) < piece.num_bytes:
            raise BadImage("truncated", f"{len(content)} of {item.num_bytes} bytes")
        image = check_image(content, limits)
    except BadImage as bad:
        return Made(None, (Dropped(item.name, bad.reason, bad.detail),))
    except OSError as error:
        raise unreadable(item.archive, error) from error
    record: dict[str, Any] = {
        "source": source,
        "source_name": item.name,
        "objects": [],
        "tags": [],
        "phash": image.phash,
    }
    told: tuple[str, ...] = ()
    if item.category is not None:
        record["category"] = categories[item.category]
        record["tags"] = [[categories[item.category], 1.0]]
        told = captions.get(item.category, ())
    record |= json.loads(item.extra) if item.extra else {}
    if image.changed:
        record["changed"] = image.changed
    return Made(
        Sample(item.key, image.content, image.extension, image.size, told, item.category, record=record)
    )
