"""What is a finished list of rows on disk? Parquet parts, and rows.json, written last, that vouches for them.

rows/part-00000.parquet ...   key, url, caption, sha256, md5, extra (JSON), in their final order
rows/rejects.parquet          source (file), row (line, or row of a parquet file, from 1), reason, text
rows/rows.json                settings, inputs, rows and sha256 of every part, counts by reason
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.files import sha256_file, write_atomic

ROWS_NAME, REJECTS_NAME = "rows.json", "rejects.parquet"
COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("sha256", pa.string()),
        ("md5", pa.string()),
        ("extra", pa.string()),
    ]
)
REJECT_COLUMNS = pa.schema(
    [("source", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("text", pa.string())]
)


@dataclass(frozen=True)
class Part:
    """One parquet file of a list."""

    name: str
    num_rows: int
    sha256: str


@dataclass(frozen=True)
class Rows:
    """A finished list; `num_inputs` = `num_rows` + the sum of `rejects`."""

    folder: Path
    parts: tuple[Part, ...]
    settings: Mapping[str, Any]  # what decided the rows, inputs and their hashes among it
    rejects: Mapping[str, int]  # reason -> number of input rows
    num_inputs: int  # rows and lines of the inputs
    num_repaired: int  # rows with a cell that was no UTF-8 and was read as Windows-1252
    side_rejects: Mapping[str, int]  # further table -> its lines that were no rows, those with any
    notes: Mapping[str, int] = field(
        default_factory=dict
    )  # note of the query -> rows, repeated addresses among them
    stamps: Mapping[str, str | None] = field(
        default_factory=dict
    )  # input -> its size and time when it was hashed

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.num_rows for part in self.parts)


def part_name(number: int) -> str:
    """File name of a part: 7 -> "part-00007.parquet"."""
    return f"part-{number:05d}.parquet"


def read_rows(folder: Path) -> Rows:
    """The list in `folder`, every byte of it verified.

    Raises FileNotFoundError when it is unfinished or a part is gone, ValueError when something in it changed.
    """
    rows = parse_rows(folder)
    for part in rows.parts:
        path = folder / part.name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, {ROWS_NAME} names it: remove {folder} and run again")
        if sha256_file(path) != part.sha256:
            raise ValueError(
                f"{path} is not what {ROWS_NAME} vouches for (sha256 differs): remove {folder} and run again"
            )
    return rows


def write_record(rows: Rows) -> None:
    """Write rows.json, whole or not at all."""
    record = asdict(rows)
    del record["folder"]
    write_atomic(rows.folder / ROWS_NAME, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def parse_rows(folder: Path) -> Rows:
    """What rows.json says, its counts checked; the parts are not looked at."""
    path = folder / ROWS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing (it is written last): run the same command again")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        parts = tuple(Part(**part) for part in record.pop("parts"))
        rows = Rows(folder, parts, **record)
        is_whole = rows.num_inputs == rows.num_rows + sum(rows.rejects.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no list of rows ({error}): remove {folder} and run again") from error
    if not is_whole:
        raise ValueError(f"{path}: its counts do not add up to its inputs: remove {folder} and run again")
    return rows
