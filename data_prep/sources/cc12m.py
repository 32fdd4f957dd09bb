"""How is Conceptual 12M read? A table of address and caption, and, where it is given, the published hashes.

Published: `cc12m.tsv`, 12.4 million lines, **no header**, `url<TAB>caption`, no quoting; names of persons are
replaced by <PERSON>. Hashes: `cc12m.tsv.gz`, lines of `url<TAB>SHA256<TAB>MD5`: an image that changed since is then
left out.

    curl -O https://storage.googleapis.com/conceptual_12m/cc12m.tsv
    curl -o cc12m_hashes.tsv.gz https://storage.googleapis.com/cc_hashes/cc12m.tsv.gz
    python -m data_prep build cc12m --from cc12m.tsv --hashes cc12m_hashes.tsv.gz --scratch scratch/cc12m \\
        --out shards/cc12m --max-bad 0.6
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import tyro

from data_prep.download import Described, Download, Row, downloaded
from data_prep.rows import Input, Normalise, normalised
from data_prep.rows.inputs import quoted
from data_prep.rows.lines import read_lines
from data_prep.samples import Collection
from data_prep.sources.scratch import Scratch

VERSION = 1  # raise it when the same input gives other samples
PERSON = "<PERSON>"


@dataclass(frozen=True)
class Cc12m:
    """Download Conceptual 12M."""

    source: Annotated[str, tyro.conf.arg(name="from")]  # cc12m.tsv, packed or not
    scratch: Scratch
    hashes: str = ""  # the published file of hashes; empty: images are not compared
    person: str = PERSON  # what stands for a name in a caption
    rows: Normalise = field(default_factory=Normalise)
    download: Download = field(default_factory=Download)

    def collections(self) -> list[Collection]:
        """One collection; the list is normalised first, or taken from an earlier run."""
        table = Input(self.source, ("url", "caption"), partial(read_lines, num_columns=2))
        hashes = Input(self.hashes, ("url", "sha256", "md5"), partial(read_lines, num_columns=3))
        settings = {"source": "cc12m", "version": VERSION, "person": self.person, "hashes": bool(self.hashes)}
        rows = normalised(
            self.scratch / "rows",
            [table],
            self.query,
            self.rows,
            settings,
            prefix="cc12m",
            sides={"hashes": [hashes]} if self.hashes else {},
            allow_private=bool(self.download.allow_private),
        )
        return [
            downloaded(
                rows,
                self.scratch / "download",
                self.download,
                describe,
                name="cc12m",
                split="train",
                settings=settings,
                block_hashes=self.rows.block_hashes,
            )
        ]

    def query(self, columns: Sequence[str]) -> str:
        """SQL over the table, with the hashes of its addresses."""
        caption = f"replace(list.caption, '{PERSON}', {quoted(self.person)})"
        known = "NULL::VARCHAR AS sha256, NULL::VARCHAR AS md5"
        join = ""
        if self.hashes:
            known = "known.sha256, known.md5"
            join = (
                "LEFT JOIN (SELECT url, min(sha256) AS sha256, min(md5) AS md5 FROM {hashes} GROUP BY url) AS known"
                " ON known.url = list.url"
            )
        return f"""
            SELECT list.row, list.url, {caption} AS caption, NULL::DOUBLE AS similarity, {known},
                NULL::VARCHAR AS extra, NULL::VARCHAR AS refused
            FROM {{input}} AS list {join}
        """


def describe(row: Row) -> Described:
    """The caption of one row."""
    return (row.caption,) if row.caption else (), None, {"source": "cc12m", "objects": [], "tags": []}
