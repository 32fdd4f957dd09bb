"""How do judged rows become the parts of a list? Sorted by hash twice, duplicates left out, rows.json last.

By the hash of seed and address, so those of one address are neighbours. The first sort moves nothing but hashes, and
finds all but the best of each address; the second one moves what stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.files import fsync_folder, sha256_file
from data_prep.rows.folder import COLUMNS, REJECTS_NAME, Part, Rows, part_name, write_record
from data_prep.rows.inputs import TEMPORARY, Staged, quoted

NO_ADDRESS = ("columns", "empty_line", "no_url", "url_malformed", "url_scheme")
MAX_WITHOUT = 0.5  # of all rows; with more of them it is another table than the source publishes
ROW_GROUP = 65_536  # rows; a reader of some rows reads so many at most beside them
FORMAT = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": ["extra"],
    "write_statistics": False,
}


def write_rows(
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    judged: Sequence[Path],
    lists: Sequence[Staged],
    side_rejects: Mapping[str, int],
    settings: Mapping[str, Any],
    stamps: Mapping[str, str | None],
) -> Rows:
    """Write the parts, the rejects and at last rows.json; `judged` has the verdicts on every one of `lists`.

    `settings` are those of the whole list, its `prefix` of keys and `rows_per_part` among them; `stamps` is kept as
    it is. Raises ValueError
    when no row is left, or most rows have no address.
    """
    for leftover in [*folder.glob("*.parquet"), *folder.glob(f"*{TEMPORARY}")]:
        leftover.unlink()
    verdicts = f"read_parquet([{', '.join(quoted(path) for path in judged)}])"
    _require_table(connection, verdicts, lists)
    twice = judged[0].with_name("twice.parquet")
    _write_repeated(connection, verdicts, twice)
    tables = _unique(connection, verdicts, twice)
    parts = _write_parts(folder, tables, settings["rows_per_part"], settings["prefix"])
    if not parts:
        reasons = connection.execute(
            f"SELECT reason, count(*) FROM {verdicts} GROUP BY 1 ORDER BY 2 DESC"
        ).fetchall()
        own = ", or pass --allow-private with your own network, such as 127.0.0.0/8"
        raise ValueError(
            f"{folder}: no row of the list is left ({dict(reasons)}): check the input and the filters"
            f"{own if 'url_private' in dict(reasons) else ''}"
        )
    _write_rejects(connection, folder, verdicts, twice, lists)
    counts = connection.execute(
        f"SELECT reason, count(*) FROM read_parquet({quoted(folder / REJECTS_NAME)}) GROUP BY 1 ORDER BY 1"
    ).fetchall()
    notes = dict(
        connection.execute(
            f"SELECT note, count(*) FROM {verdicts} WHERE note IS NOT NULL GROUP BY 1 ORDER BY 1"
        ).fetchall()
    )
    num_inputs = sum(one.num_lines() for one in lists)
    num_repaired = sum(one.num_repaired for one in lists)
    rows = Rows(folder, parts, settings, dict(counts), num_inputs, num_repaired, side_rejects, notes, stamps)
    assert num_inputs == rows.num_rows + sum(rows.rejects.values()), "a row was lost or counted twice"
    write_record(rows)
    return rows


def _require_table(connection: duckdb.DuckDBPyConnection, judged: str, lists: Sequence[Staged]) -> None:
    """ValueError when most of the input is no address at all: then columns are missing or in another order."""
    reasons = f"SELECT reason, text FROM {judged} WHERE reason IS NOT NULL"
    refused = " UNION ALL ".join(
        [
            reasons,
            *(
                f"SELECT reason, text FROM read_parquet({quoted(one.rejects)})"
                for one in lists
                if one.rejects
            ),
        ]
    )
    ((num_malformed, example),) = connection.execute(
        f"SELECT count(*), any_value(text) FROM ({refused}) WHERE reason IN {NO_ADDRESS}"
    ).fetchall()
    num_lines = sum(one.num_lines() for one in lists)
    if num_malformed > MAX_WITHOUT * num_lines:
        raise ValueError(
            f"{num_malformed} of {num_lines} rows of {lists[0].name} have no address where one must stand, such as"
            f" {(example or '')[:80]!r}: pass the file as it was published, with its columns in their order"
        )


def _write_repeated(connection: duckdb.DuckDBPyConnection, judged: str, twice: Path) -> None:
    """Write the places of rows whose address a better row has to the file `twice`: 128 bits of hash tell them."""
    reader = connection.sql(
        f"SELECT mix, more, coalesce(similarity, '-infinity'::DOUBLE) AS similarity, place FROM {judged}"
        " WHERE reason IS NULL ORDER BY mix"
    ).to_arrow_reader(ROW_GROUP)
    schema = pa.schema([("place", pa.int64())])
    with pq.ParquetWriter(twice, schema) as writer:
        for rows in _whole_groups(reader):
            writer.write_batch(pa.record_batch([repeated(*rows)], schema=schema))


def _whole_groups(reader: Iterable[pa.RecordBatch]) -> Iterator[list[np.ndarray]]:
    """The columns of sorted batches, cut where the first one changes."""
    left: list[np.ndarray] = []
    for batch in reader:
        columns = [column.to_numpy() for column in batch.columns]
        if left:
            columns = [np.concatenate(pair) for pair in zip(left, columns, strict=True)]
        last = np.searchsorted(columns[0], columns[0][-1]) if len(columns[0]) else 0
        left = [column[last:] for column in columns]
        yield [column[:last] for column in columns]
    if left:
        yield left


def repeated(mix: np.ndarray, more: np.ndarray, similarity: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Places [m] of all rows [n] but the best of each (mix, more): the most similar, of those the first.

    `mix` is sorted, and what is equal in it is nearly always equal in `more`.
    """
    tied = np.flatnonzero(mix[1:] == mix[:-1])
    tied = np.union1d(tied, tied + 1)  # rows of groups of more than one
    if not len(tied):
        return place[:0]
    mix, more, similarity, place = (column[tied] for column in (mix, more, similarity, place))
    if ((mix[1:] == mix[:-1]) & (more[1:] != more[:-1])).any():
        order = np.lexsort((more, mix))
        mix, more, similarity, place = (column[order] for column in (mix, more, similarity, place))
    is_first = np.concatenate([[True], (mix[1:] != mix[:-1]) | (more[1:] != more[:-1])])
    starts, group = np.flatnonzero(is_first), np.cumsum(is_first) - 1
    is_best = similarity == np.maximum.reduceat(similarity, starts)[group]
    first = np.minimum.reduceat(np.where(is_best, place, np.iinfo(place.dtype).max), starts)
    return place[place != first[group]]


def _unique(connection: duckdb.DuckDBPyConnection, judged: str, twice: Path) -> Iterator[pa.Table]:
    """The rows that stay, in their order."""
    reader = connection.sql(
        f"SELECT url, caption, sha256, md5, extra FROM {judged} AS judged"
        f" ANTI JOIN read_parquet({quoted(twice)}) AS twice ON judged.place = twice.place"
        " WHERE reason IS NULL ORDER BY mix, more"
    ).to_arrow_reader(ROW_GROUP)
    for batch in reader:
        yield pa.Table.from_batches([batch])


def _write_parts(
    folder: Path, tables: Iterator[pa.Table], rows_per_part: int, prefix: str
) -> tuple[Part, ...]:
    """Parts of exactly `rows_per_part` rows, but the last; written while the next rows are sorted."""
    parts: list[Future[Part]] = []
    num_before = num_rows = 0
    writer: pq.ParquetWriter | None = None
    path = folder / part_name(0)
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as disk:
        for table in _ahead(tables, thread):
            while table.num_rows:
                if writer is None:
                    path = folder / part_name(len(parts))
                    writer = pq.ParquetWriter(path.with_name(path.name + TEMPORARY), COLUMNS, **FORMAT)
                piece = table[: rows_per_part - num_rows]
                writer.write_table(_with_keys(piece, num_before, prefix), ROW_GROUP)
                table, num_rows = table[piece.num_rows :], num_rows + piece.num_rows
                num_before += piece.num_rows
                if num_rows == rows_per_part:
                    parts.append(disk.submit(_finished, writer, path, num_rows))
                    writer, num_rows = None, 0
        if writer is not None:
            parts.append(disk.submit(_finished, writer, path, num_rows))
    return tuple(part.result() for part in parts)


def _ahead(tables: Iterator[pa.Table], thread: ThreadPoolExecutor) -> Iterator[pa.Table]:
    """The same tables; the next one is fetched in the thread while the last one is used."""
    coming = thread.submit(next, tables, None)
    while (table := coming.result()) is not None:
        coming = thread.submit(next, tables, None)
        yield table


def _finished(writer: pq.ParquetWriter, path: Path, num_rows: int) -> Part:
    writer.close()
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)
    return Part(path.name, num_rows, sha256_file(path))


def _with_keys(table: pa.Table, start: int, prefix: str) -> pa.Table:
    """Keys number the rows in their order."""
    numbers = pc.cast(pa.array(np.arange(start, start + table.num_rows)), pa.string())
    keys = pc.binary_join_element_wise(prefix, pc.utf8_lpad(numbers, 9, "0"), "-")
    return table.add_column(0, "key", keys).cast(COLUMNS)


def _write_rejects(
    connection: duckdb.DuckDBPyConnection, folder: Path, judged: str, twice: Path, lists: Sequence[Staged]
) -> None:
    """All rejects in the order of the inputs."""
    names = " ".join(f"WHEN {number} THEN {quoted(one.name)}" for number, one in enumerate(lists))
    pieces = [
        f"SELECT place, reason, text FROM {judged} WHERE reason IS NOT NULL",
        f"SELECT place, 'duplicate_url' AS reason, NULL AS text FROM read_parquet({quoted(twice)})",
        *(
            f"SELECT ({number}::BIGINT << 40) + row AS place, reason, text FROM read_parquet({quoted(one.rejects)})"
            for number, one in enumerate(lists)
            if one.rejects is not None
        ),
    ]
    target = folder / (REJECTS_NAME + TEMPORARY)
    connection.execute(
        f"COPY (SELECT CASE place >> 40 {names} END AS source, place & {2**40 - 1} AS row, reason, text"
        f" FROM ({' UNION ALL '.join(pieces)} ORDER BY place)) TO {quoted(target)} (FORMAT parquet, COMPRESSION zstd)"
    )
    os.replace(target, folder / REJECTS_NAME)
