"""Which rows of an input stay? One verdict a row, by SQL; what SQL cannot decide for sure is asked of Python.

`judge` writes every row of an input with its reason (null = it stays), its clean address and caption, and two
numbers that mix the seed and the address: rows sorted by them are shuffled, and those of one address are neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa

from data_prep.rows.captions import IS_TIDY, RULES, WITH_SINGLE_SPACES
from data_prep.rows.inputs import TEMPORARY, quoted
from data_prep.rows.lines import MAX_TEXT
from data_prep.rows.urls import IS_PLAIN_URL, RefusedUrl, clean_url

ASKED = 65_536  # rows that Python is asked about at a time
MALFORMED = (
    "no_url",
    "url_scheme",
    "url_malformed",
    "url_userinfo",
    "url_private",
    "url_too_long",
)  # by clean_url
_ASKED_COLUMNS = pa.schema([("row", pa.int64()), ("url", pa.string()), ("caption", pa.string())])
IS_HEX = {"sha256": "[0-9a-f]{64}", "md5": "[0-9a-f]{32}"}


@dataclass(frozen=True)
class Rules:
    """What a row must be, whatever its source."""

    seed: int
    caption: str  # of captions.RULES
    keep_empty: bool  # rows without a caption stay
    allow_private: bool


@contextmanager
def session(work: Path, memory_bytes: int, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory that spills into `work`, with no extension but what it was built with."""
    connection = duckdb.connect(config={"autoinstall_known_extensions": False})
    try:
        connection.execute(f"SET memory_limit = '{memory_bytes}B'")
        connection.execute(f"SET threads = {threads}")
        connection.execute(f"SET temp_directory = {quoted(work / 'spill')}")
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET preserve_insertion_order = false")
        yield connection
    finally:
        connection.close()


def add_functions(connection: duckdb.DuckDBPyConnection) -> None:
    """`text_plain(text)` and so on for SQL: the clean text by every rule of captions.RULES."""
    for name, rule in RULES.items():
        connection.create_function(
            f"text_{name}", partial(_map, rule), ["VARCHAR"], "VARCHAR", type="arrow", null_handling="special"
        )


def judge(connection: duckdb.DuckDBPyConnection, query: str, number: int, target: Path, rules: Rules) -> None:
    """Write the verdicts on input `number` to the parquet file `target`, whole or not at all.

    `query` gives the columns row, url, caption, similarity, sha256, md5, extra, refused (a reason, or null), and may
    give `note`, a word under which a row that stays is counted.
    """
    is_tidy = IS_TIDY[rules.caption].format(caption="caption")
    tidied = WITH_SINGLE_SPACES.format(caption="caption")
    connection.execute(f"""
        CREATE OR REPLACE TEMP TABLE given AS
        SELECT * REPLACE (CASE WHEN is_tidy THEN {tidied} ELSE caption END AS caption) FROM (
            SELECT *, CASE WHEN refused IS NULL THEN coalesce({is_tidy}, true) END AS is_tidy FROM ({query})
        )
    """)
    connection.execute("ALTER TABLE given ADD COLUMN IF NOT EXISTS note VARCHAR")
    connection.register("asked", _asked(connection, rules))
    hashes = ", ".join(
        f"CASE WHEN regexp_full_match(lower({name}), '{rule}') THEN lower({name}) END AS {name}"
        for name, rule in IS_HEX.items()
    )
    no_caption = "false" if rules.keep_empty else "coalesce(caption, '') = ''"
    blocks = "".join(
        f"WHEN {condition} THEN '{reason}' "
        for table, reason, condition in (
            ("blocked_urls", "blocked_url", "url IN (FROM blocked_urls)"),
            (
                "blocked_hashes",
                "blocked_hash",
                "sha256 IN (FROM blocked_hashes) OR md5 IN (FROM blocked_hashes)",
            ),
        )
        if connection.execute(f"FROM {table} LIMIT 1").fetchall()
    )
    temporary = target.with_name(target.name + TEMPORARY)
    connection.execute(f"""
        COPY (
            WITH cleaned AS (
                SELECT given.row, similarity, extra, refused, note, {hashes}, given.url AS raw,
                    coalesce(asked.url, given.url) AS url, coalesce(asked.caption, given.caption) AS caption
                FROM given LEFT JOIN asked ON asked.row = given.row
            ),
            judged AS (
                SELECT *, CASE
                    WHEN refused IS NOT NULL THEN refused
                    WHEN url[1] = '!' THEN url[2:]
                    WHEN {no_caption} THEN 'no_caption'
                    {blocks}
                END AS reason
                FROM cleaned
            ),
            mixed AS (
                SELECT *, CASE WHEN reason IS NULL THEN md5_number('{rules.seed}/' || url) END AS digest FROM judged
            )
            SELECT ({number}::BIGINT << 40) + row AS place, reason,
                CASE WHEN reason IS NULL THEN url END AS url,
                CASE WHEN reason IS NULL AND caption <> '' THEN caption END AS caption,
                CASE WHEN reason IS NULL THEN sha256 END AS sha256,
                CASE WHEN reason IS NULL THEN md5 END AS md5,
                CASE WHEN reason IS NULL THEN extra END AS extra,
                CASE WHEN reason IS NULL THEN note END AS note,
                CASE WHEN isfinite(similarity) THEN similarity END AS similarity,
                (digest >> 64)::UBIGINT AS mix, (digest & {2**64 - 1}::UHUGEINT)::UBIGINT AS more,
                CASE WHEN reason IN {MALFORMED} THEN left(raw, {MAX_TEXT}) END AS text
            FROM mixed
        ) TO {quoted(temporary)} (FORMAT parquet, COMPRESSION uncompressed, DICTIONARY_SIZE_LIMIT 1)
    """)
    connection.unregister("asked")
    connection.execute("DROP TABLE given")
    os.replace(temporary, target)


def _asked(connection: duckdb.DuckDBPyConnection, rules: Rules) -> pa.Table:
    """What Python says of the rows of `given` that SQL cannot judge; nulls where nothing was asked.

    The clean address, or "!" and the reason, and the clean caption.
    """
    reader = connection.sql(f"""
        SELECT * FROM (
            SELECT row, coalesce({IS_PLAIN_URL.format(url="url")}, false) AS is_url, url,
                CASE WHEN NOT is_tidy THEN caption END AS caption
            FROM given WHERE refused IS NULL
        ) WHERE NOT is_url OR caption IS NOT NULL
    """).to_arrow_reader(ASKED)
    clean = RULES[rules.caption]
    tables = []
    for batch in reader:
        plain, urls, captions = (batch[name].to_pylist() for name in ("is_url", "url", "caption"))
        verdicts = [
            None if is_plain else _verdict(url, rules.allow_private)
            for is_plain, url in zip(plain, urls, strict=True)
        ]
        cleaned = [None if caption is None else clean(caption) for caption in captions]
        columns = [pa.array(verdicts, pa.string()), pa.array(cleaned, pa.string())]
        tables.append(pa.Table.from_arrays([batch["row"], *columns], schema=_ASKED_COLUMNS))
    return pa.concat_tables(tables) if tables else _ASKED_COLUMNS.empty_table()


def _verdict(text: str | None, allow_private: bool) -> str:
    try:
        return clean_url(text, allow_private=allow_private)
    except RefusedUrl as refused:
        return f"!{refused.reason}"


def _map(function: Callable[[str], str], column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """`function` of every value that is not null."""
    return pa.array([None if text is None else function(text) for text in column.to_pylist()], pa.string())
