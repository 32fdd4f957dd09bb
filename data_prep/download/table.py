"""Which rows are to be downloaded? Any range of the normalised rows, read without the rest, in their final order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TEXT_COLUMNS = ("key", "url", "caption", "sha256", "md5", "extra")
NEEDED = ("key", "url")


@dataclass(frozen=True)
class Row:
    """One normalised row: an image to download and what is known about it."""

    key: str  # of the sample, unique
    url: str
    caption: str | None
    sha256: str | None  # published, lower-case hexadecimal; verified
    md5: str | None
    extra: Mapping[str, Any]  # whatever the source keeps


@dataclass(frozen=True)
class Table:
    """The rows of a finished `rows/` folder; small and picklable, for it is read in the workers."""

    folder: Path
    parts: tuple[tuple[str, int], ...]  # (file name, number of rows)
    identity: str  # sha256 over the sha256 of the parts: another list is another table

    @classmethod
    def of(cls, rows: Any) -> Table:
        """The table of `data_prep.rows.Rows`, which has checked its parts."""
        told = [[part.num_rows, part.sha256] for part in rows.parts]
        identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        return cls(
            Path(rows.folder).resolve(), tuple((part.name, part.num_rows) for part in rows.parts), identity
        )

    def __len__(self) -> int:
        return sum(num_rows for _, num_rows in self.parts)

    def read(self, first: int, count: int, columns: Sequence[str] = TEXT_COLUMNS) -> pa.Table:
        """Rows [first, first + count) with these columns, as strings; columns that the files lack are null."""
        schema = pa.schema([(name, pa.string()) for name in columns])
        found = [piece.select(columns).cast(schema) for piece in self._pieces(first, first + count, columns)]
        table = pa.concat_tables(found) if found else schema.empty_table()
        if table.num_rows != count:
            raise ValueError(
                f"{self.folder} gives {table.num_rows} of rows {first} to {first + count - 1}, rows.json promises"
                " them all: normalise the list again"
            )
        return table

    def rows(self, first: int, count: int) -> list[Row]:
        """Rows [first, first + count), typed."""
        records = self.read(first, count).to_pylist()
        return [Row(**{**record, "extra": json.loads(record["extra"] or "{}")}) for record in records]

    def _pieces(self, first: int, end: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        start = 0  # number of the first row of a part or row group
        for name, num_rows in self.parts:
            if start < end and start + num_rows > first:
                with pq.ParquetFile(self.folder / name) as file:
                    there = [column for column in columns if column in file.schema_arrow.names]
                    if missing := [name for name in NEEDED if name in columns and name not in there]:
                        raise ValueError(
                            f"{self.folder / name} lacks columns {missing}: normalise the list again"
                        )
                    yield from self._groups(file, start, first, end, there, columns)
            start += num_rows

    @staticmethod
    def _groups(
        file: pq.ParquetFile, start: int, first: int, end: int, there: list[str], columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if start < end and start + num_rows > first:
                table = file.read_row_group(group, columns=there, use_threads=False)
                for name in columns:
                    if name not in there:
                        table = table.append_column(name, pa.nulls(num_rows, pa.string()))
                low = max(0, first - start)
                yield table.slice(low, min(num_rows, end - start) - low)
            start += num_rows
