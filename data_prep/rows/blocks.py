"""What must never be downloaded or kept? Files of addresses and of hashes, one a line; every line is read or refused.

Lines that are empty or begin with # say nothing. An entry that cannot be read is an error, since a block list that is
obeyed in part is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa

from data_prep.rows.lines import read_lines
from data_prep.rows.urls import RefusedUrl, clean_url

_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{32}")
_SHOWN = 80  # characters of an entry in an error


class _BadEntry(Exception):
    """The rule that an entry breaks."""


def blocked_hashes(path: Path) -> Iterator[list[str]]:
    """The hashes of one file in lower case, many at a time; ValueError with the line of an entry that is none."""
    return _entries(path, _hash)


def add_blocks(connection: duckdb.DuckDBPyConnection, urls: Sequence[Path], hashes: Sequence[Path]) -> None:
    """The tables blocked_urls and blocked_hashes, from files with one entry a line.

    Raises ValueError with the line of an entry that is no address, or no sha256 or md5.
    """
    for table, paths, spelling in (("blocked_urls", urls, _address), ("blocked_hashes", hashes, _hash)):
        connection.execute(f"CREATE TABLE {table} (entry VARCHAR)")
        for path in paths:
            for entries in _entries(path, spelling):
                connection.register("entries", pa.table({"entry": pa.array(entries, pa.string())}))
                connection.execute(f"INSERT INTO {table} FROM entries")
                connection.unregister("entries")


def _entries(path: Path, spelling: Callable[[str], str]) -> Iterator[list[str]]:
    """The entries of a file in the one spelling that rows are compared in, some at a time."""
    with open(path, "rb") as file:
        if file.read(4) == b"PAR1":
            raise ValueError(
                f"{path} is a parquet file, a block list is a text with one entry a line: export it as one"
            )
    for block in read_lines(path, 1):
        for number, reason, text in block.rejects:
            if reason != "empty_line" and not text.startswith("#"):
                rule = {"columns": "a line must hold one entry and no tab"}.get(reason, reason)
                raise _error(path, number, text, rule)
        entries = []
        for number, (text,) in zip(block.numbers, block.rows, strict=True):
            entry = text.strip()
            if not entry or entry.startswith("#"):
                continue
            try:
                entries.append(spelling(entry))
            except _BadEntry as bad:
                raise _error(path, number, entry, str(bad)) from bad
        yield entries


def _error(path: Path, number: int, text: str, rule: str) -> ValueError:
    return ValueError(
        f"{path}, line {number}: {text[:_SHOWN]!r} cannot be blocked, {rule}: mend that line, or begin it with #"
    )


def _address(text: str) -> str:
    try:
        return clean_url(text, allow_private=True)
    except RefusedUrl as refused:
        raise _BadEntry(f"it must be an address such as http://host/path ({refused.reason})") from refused


def _hash(text: str) -> str:
    if not _HASH.fullmatch(text.lower()):
        raise _BadEntry("it must be 64 (sha256) or 32 (md5) hexadecimal digits")
    return text.lower()
