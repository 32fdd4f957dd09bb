"""How do files of addresses become one shuffled list without duplicates? Judge each, sort, write the parts.

The order is by a hash of seed and address, so it depends on neither the order nor the number of the input files, nor
on threads. Of rows with one address the one of the highest similarity stays, then the first. Work that is finished is
kept beside the list until that is whole: an interrupted run continues with the next input.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import duckdb

from data_prep.files import write_atomic
from data_prep.rows.blocks import add_blocks
from data_prep.rows.captions import RULES
from data_prep.rows.folder import REJECTS_NAME, ROWS_NAME, Rows, parse_rows, read_rows, write_record
from data_prep.rows.inputs import Input, Staged, fetched, identity, staged, stamp_of
from data_prep.rows.judge import Rules, add_functions, judge, session
from data_prep.rows.parts import write_rows
from data_prep.settings import difference

VERSION = 1  # raise it when the same input gives other rows
WORK_FOLDER = ".work"  # inside the folder of a list while it is being made
UNITS = {"MiB": 2**20, "GiB": 2**30}
AT_ONCE = 2  # inputs that are judged: while Python looks at a row of one, SQL goes on with the other
FOR_SQL = 0.6  # of the memory; the rest is for rows on their way in and out
Query = Callable[[tuple[str, ...]], str]  # names of an input's columns -> SQL over {input}, see `judge`


@dataclass(frozen=True)
class Normalise:
    """How a list of addresses is made, whatever its source."""

    seed: int = 0  # of the order
    rows_per_part: int = 1_000_000  # of a parquet file of the finished list
    metadata_memory: str = "4GiB"  # at most, for the whole step
    metadata_threads: int = 2  # of the database that judges and sorts the list
    keep_empty: bool = False  # rows without a caption stay
    block_urls: tuple[str, ...] = ()  # files of addresses never to download, one a line
    block_hashes: tuple[str, ...] = ()  # files of sha256 or md5 of images never to keep, one a line

    def __post_init__(self) -> None:
        if self.rows_per_part < 1:
            raise ValueError(f"rows_per_part={self.rows_per_part} must be at least 1: pass 1000000")
        if self.metadata_threads < 1:
            raise ValueError(
                f"metadata_threads={self.metadata_threads} must be at least 1: pass --metadata-threads 2"
            )
        if self.memory_bytes < 256 * 2**20:
            raise ValueError(
                f"metadata_memory={self.metadata_memory!r} must be at least 256MiB: pass --metadata-memory 4GiB"
            )

    @property
    def blocks(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The block lists, of addresses and of hashes."""
        return self.block_urls, self.block_hashes

    @property
    def memory_bytes(self) -> int:
        """The limit as a number."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MiB|GiB)", self.metadata_memory)
        if found is None:
            raise ValueError(
                f"metadata_memory={self.metadata_memory!r} must be a number of MiB or GiB: pass"
                " --metadata-memory 4GiB"
            )
        return int(float(found[1]) * UNITS[found[2]])


def normalised(
    folder: Path,
    inputs: Sequence[Input],
    query: Query,
    options: Normalise,
    settings: Mapping[str, Any],
    *,
    prefix: str,
    caption: str = "plain",
    has_captions: bool = True,
    sides: Mapping[str, Sequence[Input]] | None = None,
    allow_private: bool = False,
) -> Rows:
    """The list of all inputs in `folder`, made now or by an earlier run.

    Of a finished one only sizes and times of the inputs are looked at; an input that differs in them is hashed again.

    `prefix` begins every key; `caption` is one of captions.RULES; without `has_captions` rows need none; `sides` are
    further tables, which the query calls {name}; `settings` is what decides the query. Raises ValueError for other
    settings or inputs in that folder, and for a list without rows.
    """
    if caption not in RULES:
        raise ValueError(f"caption={caption!r} is unknown; choose from {sorted(RULES)}")
    sides = sides or {}
    names = _files(inputs, sides, options)
    rules = Rules(options.seed, caption, options.keep_empty or not has_captions, allow_private)
    settings = {
        "version": VERSION,
        **asdict(rules),
        "prefix": prefix,
        "rows_per_part": options.rows_per_part,
        "source": dict(settings),
        "blocked": [_last(name) for name in chain(*options.blocks)],
    }
    settings = json.loads(json.dumps(settings))
    work = folder / WORK_FOLDER
    if not work.exists() and (rows := _known(folder, names, settings)):
        return _told(rows)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if rows := _known(folder, names, settings):  # since, or with leftovers
            shutil.rmtree(work, ignore_errors=True)
            return _told(rows)
        work.mkdir(exist_ok=True)
        stamps = {_last(name): stamp_of(name) for name in names}
        paths = {name: fetched(name, work) for name in names}
        with ThreadPoolExecutor(options.metadata_threads) as pool:
            found = pool.map(lambda path: identity(path, work), paths.values())
            settings["inputs"] = dict(zip(map(_last, paths), found, strict=True))
        if (folder / ROWS_NAME).is_file():  # an input was written again, or lies elsewhere now
            _require_same(folder, settings, parse_rows(folder).settings)
            rows = replace(read_rows(folder), stamps=stamps)
            write_record(rows)
            shutil.rmtree(work)
            return _told(rows)
        recorded = work / "settings.json"
        if recorded.is_file():
            _require_same(folder, settings, json.loads(recorded.read_text()))
        write_atomic(recorded, json.dumps(settings).encode())
        memory = int(options.memory_bytes * FOR_SQL)
        with session(work, memory, options.metadata_threads) as connection:
            add_functions(connection)
            add_blocks(connection, *([paths[name] for name in several] for several in options.blocks))
            tables = {name: _staged(several, paths, work, f"side-{name}") for name, several in sides.items()}
            lists = _staged(inputs, paths, work, "input")
            with ThreadPoolExecutor(
                min(AT_ONCE, options.metadata_threads)
            ) as pool:  # for their Python; SQL has its own
                judged = list(
                    pool.map(
                        lambda pair: _judged(connection, *pair, query, tables, work, rules), enumerate(lists)
                    )
                )
            refused = {one.name: one.num_rejects() for one in chain(*tables.values())}
            side_rejects = {name: count for name, count in refused.items() if count}
            try:
                rows = write_rows(connection, folder, judged, lists, side_rejects, settings, stamps)
            except ValueError:  # nothing to go on from: the next run may ask for something else
                shutil.rmtree(work)
                raise
        shutil.rmtree(work)
    return _told(rows)


def _told(rows: Rows) -> Rows:
    """Says what a list holds and what was left out of it: a filter that is too strict must not go unseen."""
    counts = sorted(rows.rejects.items(), key=lambda pair: -pair[1])
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in counts) or "nothing"
    repaired = f", {rows.num_repaired:,} read as Windows-1252" if rows.num_repaired else ""
    print(
        f"{rows.folder}: {rows.num_rows:,} of {rows.num_inputs:,} rows{repaired}; left out: {left_out}"
        f"{f' ({REJECTS_NAME} names each)' if counts else ''}",
        file=sys.stderr,
    )
    return rows


def _known(folder: Path, names: Sequence[str], settings: Mapping[str, Any]) -> Rows | None:
    """The finished list, where size and time of every input are those of then; None where one has to be looked into.

    `settings` are those without the inputs. Raises ValueError for others, before anything is copied.
    """
    if not (folder / ROWS_NAME).is_file():
        return None
    rows = parse_rows(folder)
    inputs = rows.settings.get("inputs", {})
    _require_same(folder, {**settings, "inputs": inputs}, rows.settings)
    if {_last(name) for name in names} != set(inputs):
        return None
    for name in names:
        stamp = stamp_of(name)
        if stamp is None or stamp != rows.stamps.get(_last(name)):
            return None
    return read_rows(folder)


def _staged(inputs: Sequence[Input], paths: Mapping[str, Path], work: Path, label: str) -> list[Staged]:
    return [
        staged(source, paths[source.path], work, f"{label}-{number:05d}")
        for number, source in enumerate(inputs)
    ]


def _judged(
    connection: duckdb.DuckDBPyConnection,
    number: int,
    listed: Staged,
    query: Query,
    tables: Mapping[str, Sequence[Staged]],
    work: Path,
    rules: Rules,
) -> Path:
    """The verdicts on one input, made now or by an earlier run."""
    target = work / f"verdicts-{number:05d}.parquet"
    if not target.is_file():
        statement = query(listed.columns()).replace("{input}", listed.sql)
        for name, several in tables.items():
            union = " UNION ALL ".join(f"SELECT * FROM {one.sql}" for one in several)
            statement = statement.replace("{" + name + "}", f"({union})")
        with connection.cursor() as own:  # whose temporary tables no other input sees
            judge(own, statement, number, target, rules)
    return target


def _last(path: str) -> str:
    """The last part of a path or URL."""
    return path.rstrip("/").rpartition("/")[2]


def _files(inputs: Sequence[Input], sides: Mapping[str, Sequence[Input]], options: Normalise) -> list[str]:
    names = [source.path for source in chain(inputs, *sides.values())]
    names += chain(*options.blocks)
    if not inputs:
        raise ValueError("a list needs at least one input file: pass its path")
    ends = [_last(name) for name in dict.fromkeys(names)]
    if twice := [end for end, count in Counter(ends).items() if count > 1]:
        raise ValueError(f"two inputs are called {twice[0]!r}, names tell them apart: rename one")
    return list(dict.fromkeys(names))


def _require_same(folder: Path, wanted: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    if differing := difference(there, wanted):
        raise ValueError(
            f"{folder} was begun with other settings or inputs ({differing}); a folder holds one list:"
            " choose another --scratch, or remove that folder"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer a list at a time, the others wait for it; the lock dies with its process."""
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder} is being made by another process: waiting until it ends", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
