"""How does a test get a list of normalised rows? Written as the normalisation writes it, from a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.download import Described, Download, Row
from data_prep.files import sha256_file
from data_prep.limits import Limits

LOOPBACK = ("127.0.0.1/32",)  # and nothing else that is private
QUICK = {  # options for servers on the loopback interface
    "threads": 32,
    "timeout": 2.0,
    "deadline": 3.0,
    "retries": 1,
    "stall": 4.0,
    "shard_deadline": 60.0,
    "allow_private": LOOPBACK,
    "limits": Limits(min_side=16, max_bytes=2**20),
    "min_free": 0,
}


def quick(**changed: Any) -> Download:
    """Options that end within seconds."""
    return Download(**{**QUICK, **changed})


@dataclass(frozen=True)
class Part:
    """A file of rows."""

    name: str
    num_rows: int
    sha256: str


@dataclass(frozen=True)
class Rows:
    """What the normalisation hands over."""

    folder: Path
    parts: tuple[Part, ...]


def rows_of(folder: Path, urls: Sequence[str | Mapping[str, Any]], part_size: int = 1000) -> Rows:
    """A finished `rows/` folder of these URLs (or columns), with keys r-0, r-1, ..."""
    folder.mkdir()
    records = [
        {"key": f"r-{number}", "caption": f"Picture \"{number}", "sha256": None, "md5": None, "extra": None}
        | ({"url": row} if isinstance(row, str) else dict(row))
        for number, row in enumerate(urls)
    ]  # fmt: skip
    parts = []
    for start in range(0, len(records), part_size):
        chunk = records[start : start + part_size]
        schema = pa.schema([(name, pa.string()) for name in chunk[0]])
        name = f"part-{len(parts):05d}.parquet"
        pq.write_table(pa.Table.from_pylist(chunk, schema), folder / name, row_group_size=7)
        parts.append(Part(name, len(chunk), sha256_file(folder / name)))
    return Rows(folder, tuple(parts))


def describe(row: Row) -> Described:
    """A caption and whatever else is there."""
    return (row.caption,) if row.caption else (), None, {"source": "test", **row.extra}
