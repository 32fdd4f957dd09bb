"""How does a metadata file come into reach of SQL? Copied when it is remote, its lines made a parquet table.

Parquet files are read where they lie. Everything here is kept in the work folder of a list until that is finished,
so an interrupted run does none of it twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.files import sha256_file, write_atomic
from data_prep.places import Place, place_of
from data_prep.rows.folder import REJECT_COLUMNS
from data_prep.rows.lines import Block
from data_prep.stores import patiently

TEMPORARY = ".tmp"
ROW_GROUP = 65_536  # rows
PARQUET_MARK = b"PAR1"  # first bytes of such a file
_REMEMBERING = threading.Lock()  # of hashes


@dataclass(frozen=True)
class Input:
    """A metadata file: parquet, or whatever `read` makes blocks of rows with these `columns` of."""

    path: str  # on disk, or any URL that fsspec opens
    columns: tuple[str, ...] = ()
    read: Callable[[Path], Iterator[Block]] | None = None  # None: parquet

    @property
    def name(self) -> str:
        """How rejects and rows.json call it."""
        return self.path.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Staged:
    """An input as SQL sees it."""

    name: str
    table: Path  # parquet
    rejects: Path | None  # lines that were no rows, as parquet; None for a parquet input
    num_repaired: int = 0

    @property
    def sql(self) -> str:
        """A relation with the column `row`, the number of the line or of the row of a parquet file, from 1."""
        if self.rejects is None:
            table = f"read_parquet({quoted(self.table)}, file_row_number=true)"
            return f"(SELECT *, file_row_number + 1 AS row FROM {table})"
        return f"read_parquet({quoted(self.table)})"

    def columns(self) -> tuple[str, ...]:
        """Names of its columns, in the file's own spelling."""
        return tuple(pq.read_schema(self.table).names)

    def num_rejects(self) -> int:
        """Lines that were no rows."""
        return 0 if self.rejects is None else pq.read_metadata(self.rejects).num_rows

    def num_lines(self) -> int:
        """Rows and rejects together."""
        return pq.read_metadata(self.table).num_rows + self.num_rejects()


def quoted(text: object) -> str:
    """A literal of SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def split_path(path: str) -> tuple[Place, str]:
    """The folder that holds a file, on disk or behind a URL, and the file's name in it."""
    folder, slash, name = path.rstrip("/").rpartition("/")
    return place_of(folder or slash or "."), name


def expanded(paths: Sequence[str], what: str) -> tuple[str, ...]:
    """The files that paths, folders (all .parquet below) and patterns name; FileNotFoundError where one has none."""
    found: list[str] = []
    for text in paths:
        place, name = split_path(text)
        if any(sign in name for sign in "*?["):
            names = [f"{place}/{one}" for one in place.names(name)]
        elif place.exists(name):
            names = [text]
        else:
            names = _below(place_of(text))
        if not names:
            is_empty = is_folder(place_of(text))
            told = "is a folder without .parquet files" if is_empty else "does not exist, or matches no file"
            raise FileNotFoundError(
                f"{text} {told}: pass the {what}, a folder of parquet files, or a pattern"
            )
        found += names
    return tuple(dict.fromkeys(found))


def _below(folder: Place) -> list[str]:
    """The parquet files of a folder and of all folders in it but hidden ones."""
    names = [f"{folder}/{one}" for one in folder.names("*.parquet")]
    return names + [
        one for inside in folder.folders() if inside[0] != "." for one in _below(folder.child(inside))
    ]


def existing(path: str) -> tuple[Place, str]:
    """Folder and name of a file that is there; FileNotFoundError without it, IsADirectoryError for a folder."""
    place, name = split_path(path)
    if place.exists(name):
        return place, name
    if is_folder(place_of(path)):
        raise IsADirectoryError(f"{path} is a folder, a file is needed: pass the file in it")
    raise FileNotFoundError(f"{path} does not exist: check the path, or download it first")


def is_folder(place: Place) -> bool:
    """Whether a place is a folder on disk, or holds anything behind a URL."""
    if place.local is not None:
        return place.local.is_dir()
    return bool(place.names() or place.folders())


def stamp_of(path: str) -> str | None:
    """What changes when a file is written again, without reading it: size, and ETag or time; None where none is told.

    Raises FileNotFoundError without the file.
    """
    place, name = existing(path)
    entry = place.entry(name)
    state = entry.state or patiently(path, _modified)
    return f"{entry.size}|{state}" if state else None


def _modified(fs: Any, path: str) -> str:
    try:
        return str(fs.modified(path))
    except NotImplementedError:  # by HTTP, for one
        return ""


def fetched(path: str, work: Path) -> Path:
    """The file on this disk: itself, or a whole copy in `work` that an earlier run may have made.

    A file that was written again since is copied again. Raises FileNotFoundError and IsADirectoryError.
    """
    place, name = existing(path)
    if place.local is not None:
        return place.local / name
    num_bytes = place.size(name)
    mark = hashlib.sha256(f"{path}|{stamp_of(path)}".encode()).hexdigest()[:12]
    target = work / f"copy-{mark}-{name}"
    if target.is_file() and target.stat().st_size == num_bytes:
        return target
    work.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + TEMPORARY)
    with place.open(name) as source, open(temporary, "wb") as file:
        shutil.copyfileobj(source, file, 4 * 2**20)
    if temporary.stat().st_size != num_bytes:
        raise OSError(
            f"{path}: {temporary.stat().st_size} of {num_bytes} bytes came: run the same command again"
        )
    os.replace(temporary, target)
    return target


def identity(path: Path, work: Path) -> dict[str, object]:
    """Size and SHA-256 of a file; the hash is remembered in `work` for as long as size and time stay the same.

    Threads may ask at once.
    """
    status = path.stat()
    memory = work / "hashes.json"
    mark = f"{path}|{status.st_size}|{status.st_mtime_ns}"
    known = json.loads(memory.read_text()) if memory.is_file() else {}
    if mark not in known:
        digest = sha256_file(path)
        with _REMEMBERING:
            known = json.loads(memory.read_text()) if memory.is_file() else {}
            known[mark] = digest
            write_atomic(memory, json.dumps(known).encode())
    return {"num_bytes": status.st_size, "sha256": known[mark]}


def staged(source: Input, path: Path, work: Path, label: str) -> Staged:
    """The input as a table; `label` names its files in `work`. Rows go to disk block by block."""
    if source.read is None:
        _require_parquet(path)
        return Staged(source.name, path, None)
    if _starts(path) == PARQUET_MARK:
        raise ValueError(
            f"{source.path} is a parquet file, a text with the columns {list(source.columns)} is needed: pass the"
            " file as it was published"
        )
    table, rejects, done = (work / f"{label}{end}" for end in (".parquet", ".rejects.parquet", ".json"))
    if not done.is_file():
        num_repaired = _write(source, path, table, rejects)
        _require_rows(source, table, rejects)
        write_atomic(done, json.dumps({"num_repaired": num_repaired}).encode())
    return Staged(source.name, table, rejects, json.loads(done.read_text())["num_repaired"])


def _write(source: Input, path: Path, table: Path, rejects: Path) -> int:
    schema = pa.schema([("row", pa.int64()), *((name, pa.string()) for name in source.columns)])
    num_repaired = 0
    with (
        pq.ParquetWriter(table, schema, compression="lz4") as rows,
        pq.ParquetWriter(rejects, REJECT_COLUMNS, compression="zstd") as refused,
    ):
        for block in source.read(path):
            num_repaired += block.num_repaired
            if block.rows:
                columns = [pa.array(column, pa.string()) for column in zip(*block.rows, strict=True)]
                numbers = pa.array(block.numbers, pa.int64())
                rows.write_table(pa.Table.from_arrays([numbers, *columns], schema=schema), ROW_GROUP)
            if block.rejects:
                lines, reasons, texts = zip(*block.rejects, strict=True)
                columns = [[source.name] * len(lines), lines, reasons, texts]
                refused.write_table(
                    pa.Table.from_arrays(
                        [
                            pa.array(column, kind)
                            for column, kind in zip(columns, REJECT_COLUMNS.types, strict=True)
                        ],
                        schema=REJECT_COLUMNS,
                    )
                )
    return num_repaired


def _require_rows(source: Input, table: Path, rejects: Path) -> None:
    """ValueError when most lines of a file are no rows: then it is another table than the source publishes."""
    num_rows, num_rejects = (pq.read_metadata(path).num_rows for path in (table, rejects))
    if num_rejects > num_rows:
        row = pq.read_table(rejects).slice(0, 1).to_pylist()[0]
        raise ValueError(
            f"{num_rejects} of {num_rows + num_rejects} lines of {source.path} are no rows of the columns"
            f" {list(source.columns)}, such as line {row['row']} ({row['reason']}): {row['text'][:80]!r}; pass the"
            " file as it was published"
        )


def _require_parquet(path: Path) -> None:
    if _starts(path) != PARQUET_MARK:
        raise ValueError(
            f"{path} is no parquet file, it begins with {_starts(path)!r}: pass the parquet parts of the list"
        )
    try:
        pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is a parquet file that was cut off or damaged, its end cannot be read: download it again"
        ) from error


def _starts(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(PARQUET_MARK))
