"""How is YFCC-15M read? CLIP's list of photos joined with the texts of YFCC100M; images from its public bucket.

Published: `yfcc100m_subset_data.tsv.bz2`, 14,829,396 lines of `line<TAB>photo id<TAB>photo hash`. Texts, one of:
`yfcc100m_dataset` (one file or several, packed or not, no header, title and description in URL form; 23 columns
that begin with the photo id, or 25 that begin with line, photo id and hash), or `yfcc100m_dataset.sql`, an SQLite
file with the table `yfcc100m_dataset`. An image lies at `<bucket>/data/images/abc/def/abcdef....jpg`, where
abcdef.... is the photo hash: the MD5 of the download address, with the leading zero of every byte dropped.

    curl -O https://openaipublic.azureedge.net/clip/data/yfcc100m_subset_data.tsv.bz2
    aws s3 cp --no-sign-request s3://multimedia-commons/tools/etc/yfcc100m_dataset.sql .
    python -m data_prep build yfcc15m --from yfcc100m_subset_data.tsv.bz2 --texts yfcc100m_dataset.sql \\
        --scratch scratch/yfcc15m --out shards/yfcc15m --max-bad 0.3
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep.download import Described, Download, Row, downloaded
from data_prep.rows import Input, Normalise, expanded, normalised
from data_prep.rows.inputs import quoted
from data_prep.rows.lines import BadLine, Block, read_lines
from data_prep.samples import Collection
from data_prep.sources.scratch import Scratch

VERSION = 1  # raise it when the same input gives other samples
BUCKET = "https://multimedia-commons.s3-us-west-2.amazonaws.com"
TABLE = "yfcc100m_dataset"
FIELDS = (
    "photoid",
    "title",
    "description",
    "downloadurl",
    "licensename",
    "marker",
)  # as the SQLite table calls them
PLACES = {
    23: (0, 6, 7, 14, 15, 22),
    25: (1, 8, 9, 16, 17, 24),
}  # columns of a line -> where FIELDS stand in it
VIDEO = "1"  # marker
SQLITE_START = b"SQLite format 3\0"
# SQL for the hash of an address: its MD5 by bytes, each without a leading zero.
HASH_OF = "regexp_replace(md5({address}), '0([0-9a-f])|([0-9a-f][0-9a-f])', '\\1\\2', 'g')"
JOINED = (
    "CASE WHEN title = '' OR description = '' THEN title || description"
    " WHEN regexp_matches(title, '[.!?:;,]$') THEN title || ' ' || description"
    " ELSE title || '. ' || description END"
)
CAPTIONS = {  # rule -> SQL of the caption that a row needs
    "joined": JOINED,  # "Title. Description"
    "title": "title",
    "description": "description",
    "separate": "CASE WHEN title = '' THEN description ELSE title END",  # both, as two captions
}


@dataclass(frozen=True)
class Yfcc15m:
    """Download YFCC-15M, the part of YFCC100M with English texts that CLIP was trained on."""

    source: Annotated[str, tyro.conf.arg(name="from")]  # yfcc100m_subset_data.tsv.bz2
    texts: tuple[str, ...]  # yfcc100m_dataset.sql, or the files of the TSV
    scratch: Scratch
    # which text is the caption: joined is "Title. Description", separate both as two captions
    captions: Literal["joined", "title", "description", "separate"] = "joined"
    images: str = BUCKET  # where data/images/abc/def/abcdef.jpg lies
    rows: Normalise = field(default_factory=Normalise)
    download: Download = field(default_factory=Download)

    def inputs(self) -> tuple[Input, list[Input]]:
        """The list, and the files of texts."""
        listed = Input(self.source, ("line", "photo", "hash"), partial(read_lines, num_columns=3))
        return listed, [
            Input(path, FIELDS, read_texts) for path in expanded(self.texts, "metadata of YFCC100M")
        ]

    def collections(self) -> list[Collection]:
        """One collection; the list is normalised first, or taken from an earlier run."""
        listed, texts = self.inputs()
        settings = {"source": "yfcc15m", "version": VERSION, "captions": self.captions, "images": self.images}
        rows = normalised(
            self.scratch / "rows",
            [listed],
            self.query,
            self.rows,
            settings,
            prefix="yfcc15m",
            sides={"texts": texts},
            allow_private=bool(self.download.allow_private),
        )
        return [
            downloaded(
                rows,
                self.scratch / "download",
                self.download,
                partial(describe, rule=self.captions),
                name="yfcc15m",
                split="train",
                settings=settings,
                block_hashes=self.rows.block_hashes,
            )
        ]

    def query(self, columns: Sequence[str]) -> str:
        """SQL over the list, joined with the texts."""
        known = HASH_OF.format(address="text.downloadurl")
        texts = ", ".join(f"min({name}) AS {name}" for name in FIELDS[1:])
        return f"""
            WITH text AS (
                SELECT photoid, {texts} FROM {{texts}} WHERE photoid IN (SELECT photo FROM {{input}}) GROUP BY photoid
            ),
            joined AS (
                SELECT list.row, list.photo, text_flickr(text.title) AS title,
                    text_flickr(text.description) AS description, text_flickr(text.licensename) AS license,
                    CASE WHEN list.hash = '' OR list.hash = md5(text.downloadurl) THEN {known}
                        ELSE lower(list.hash) END AS hash,
                    CASE WHEN text.photoid IS NULL THEN 'no_metadata'
                        WHEN text.marker = '{VIDEO}' THEN 'video' END AS refused
                FROM {{input}} AS list LEFT JOIN text ON text.photoid = list.photo
            )
            SELECT row, {CAPTIONS[self.captions]} AS caption, NULL::DOUBLE AS similarity, NULL::VARCHAR AS sha256,
                {quoted(self.images.rstrip("/"))} || '/data/images/' || hash[1:3] || '/' || hash[4:6] || '/' || hash
                    || '.jpg' AS url,
                NULL::VARCHAR AS md5,
                to_json({{
                    'photo': photo, 'title': title, 'description': description, 'license': license
                }})::VARCHAR AS extra,
                CASE WHEN refused IS NOT NULL THEN refused
                    WHEN NOT regexp_full_match(hash, '[0-9a-f]{{16,32}}') THEN 'photo_hash' END AS refused
            FROM joined
        """


def photo_hash(address: str) -> str:
    """The name of a photo in the bucket: the MD5 of its address, each byte in hexadecimal without a leading zero."""
    return "".join(f"{byte:x}" for byte in hashlib.md5(address.encode(), usedforsecurity=False).digest())


def describe(row: Row, *, rule: str) -> Described:
    """Caption by the rule, title and description apart, of one row."""
    told = (row.extra["title"], row.extra["description"]) if rule == "separate" else (row.caption or "",)
    record = {"source": "yfcc15m", "objects": [], "tags": [], **row.extra}
    return tuple(dict.fromkeys(text for text in told if text)), None, record


def read_texts(path: Path) -> Iterator[Block]:
    """The FIELDS of every photo, from a TSV or from SQLite; ValueError for another table."""
    with open(path, "rb") as file:
        is_sqlite = file.read(len(SQLITE_START)) == SQLITE_START
    return _from_sqlite(path) if is_sqlite else read_lines(path, len(FIELDS), _fields)


def _fields(line: str) -> list[str]:
    cells = line.split("\t")
    if len(cells) not in PLACES:
        raise BadLine("columns")
    return [cells[place] for place in PLACES[len(cells)]]


def _from_sqlite(path: Path, size: int = 50_000) -> Iterator[Block]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.text_factory = lambda content: content.decode("utf-8", "replace")
        there = {row[1] for row in connection.execute(f"PRAGMA table_info({TABLE})")}
        if missing := sorted(set(FIELDS) - there):
            raise ValueError(
                f"{path}: table {TABLE} lacks the columns {missing} (it has {sorted(there)}): pass the published"
                " yfcc100m_dataset.sql"
            )
        cursor = connection.execute(f"SELECT {', '.join(FIELDS)} FROM {TABLE}")
        number = 1
        while rows := cursor.fetchmany(size):
            cells = [["" if value is None else str(value) for value in row] for row in rows]
            yield Block(list(range(number, number + len(rows))), cells)
            number += len(rows)
