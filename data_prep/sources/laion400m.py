"""How is LAION-400M read, or another list of the LAION family? Parquet parts with addresses, texts and scores.

Published: 32 parts, 413 million rows, with SAMPLE_ID, URL, TEXT, HEIGHT, WIDTH, LICENSE, NSFW (UNLIKELY, UNSURE,
NSFW or rubbish), similarity (of CLIP, at least 0.3; may be NaN). LAION-2B adds LANGUAGE, hash, pwatermark and
punsafe, some derived sets md5; Re-LAION spells names in lower case and says `caption`. **Use Re-LAION-5B
(research-safe)**: the original lists hold links to abuse material that it removed; or clean an older list against
it with --block-urls.

    hf download laion/relaion400m --repo-type dataset --local-dir relaion
    python -m data_prep build laion400m --from relaion --scratch scratch/laion --out shards/laion \\
        --min-width 256 --min-height 256 --max-bad 0.6
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from data_prep.download import Described, Download, Row, downloaded
from data_prep.rows import Input, Normalise, expanded, normalised
from data_prep.samples import Collection
from data_prep.sources.scratch import Scratch

VERSION = 1  # raise it when the same input gives other samples
NAMES = {  # what a column is for -> its names in the published lists, in lower case
    "url": ("url",),
    "caption": ("text", "caption"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "similarity": ("similarity",),
    "nsfw": ("nsfw",),
    "license": ("license",),
    "language": ("language",),
    "punsafe": ("punsafe",),
    "pwatermark": ("pwatermark",),
    "aesthetic": ("aesthetic", "aesthetic_score"),
    "md5": ("md5",),
    "sha256": ("sha256",),
}
NSFW_VALUES = ("UNLIKELY", "UNSURE", "NSFW")
UNTAGGED = "UNTAGGED"  # missing, or rubbish
NUMBERS = ("width", "height", "similarity", "punsafe", "pwatermark", "aesthetic")
KEPT = ("nsfw", "similarity", "license", "language", "punsafe", "pwatermark", "aesthetic")  # in the .json


@dataclass(frozen=True)
class Laion:
    """Download a list of the LAION family.

    A row whose number is unknown fails every filter by that number. Of NSFW only the values named are refused; one
    that is missing or none of NSFW_VALUES is UNTAGGED, and rows kept with it are counted as `nsfw_untagged`.
    """

    source: Annotated[tuple[str, ...], tyro.conf.arg(name="from")]  # parquet files, folders of them, patterns
    scratch: Scratch
    name: str = "laion400m"  # of the data set, such as laion2b for another list
    min_similarity: float = 0.0  # of image and text, in [-1, 1]; 0 = all
    # values of the column nsfw that are left out: UNLIKELY, UNSURE, NSFW, or UNTAGGED for none of them
    refuse_nsfw: tuple[str, ...] = ("NSFW",)
    max_punsafe: float = 1.0  # probability of being unsafe; 1 = all
    max_pwatermark: float = 1.0  # probability of a watermark; 1 = all
    min_width: int = 0  # pixels, as the list says
    min_height: int = 0  # pixels, as the list says
    rows: Normalise = field(default_factory=Normalise)
    download: Download = field(default_factory=Download)

    def collections(self) -> list[Collection]:
        """One collection; the list is normalised first, or taken from an earlier run."""
        files = expanded(self.source, "parquet parts of the list")
        filters = {
            "min_similarity": self.min_similarity,
            "refuse_nsfw": list(self.refuse_nsfw),
            "max_punsafe": self.max_punsafe,
            "max_pwatermark": self.max_pwatermark,
            "min_width": self.min_width,
            "min_height": self.min_height,
        }
        settings: dict[str, Any] = {"source": "laion400m", "version": VERSION, **filters}
        rows = normalised(
            self.scratch / "rows",
            [Input(path) for path in files],
            self.query,
            self.rows,
            settings,
            prefix=self.name,
            allow_private=bool(self.download.allow_private),
        )
        for reason, count in rows.notes.items():
            print(f"{self.name}: {count} of {rows.num_inputs} rows are {reason}, and are kept by the filters")
        return [
            downloaded(
                rows,
                self.scratch / "download",
                self.download,
                describe,
                name=self.name,
                split="train",
                settings=settings,
                block_hashes=self.rows.block_hashes,
            )
        ]

    def query(self, columns: Sequence[str]) -> str:
        """SQL over one part with these columns; ValueError when one that is needed is missing."""
        found = columns_of(columns)
        value = {
            use: f"TRY_CAST({_name(column)} AS {'DOUBLE' if use in NUMBERS else 'VARCHAR'})"
            for use, column in found.items()
        }
        refused = []
        for reason, use, is_on, condition in (
            ("similarity", "similarity", self.min_similarity != 0, f">= {self.min_similarity}"),
            ("unsafe", "punsafe", self.max_punsafe < 1, f"<= {self.max_punsafe}"),
            ("watermark", "pwatermark", self.max_pwatermark < 1, f"<= {self.max_pwatermark}"),
            ("small", "width", self.min_width > 0, f">= {self.min_width}"),
            ("small", "height", self.min_height > 0, f">= {self.min_height}"),
        ):
            if is_on and use not in value:
                raise ValueError(
                    f"columns {list(columns)} have no {use}, the filter `{condition}` needs it: leave the filter out,"
                    " or pass a list that has the column"
                )
            if (
                is_on
            ):  # NaN is above all numbers in SQL; isnan() of DuckDB 2.0 is false for columns of parquet files
                good = f"{value[use]} {condition} AND isfinite({value[use]})"
                refused.append(f"WHEN NOT coalesce({good}, false) THEN '{reason}'")
        if self.refuse_nsfw and "nsfw" not in value:
            raise ValueError(
                f"columns {list(columns)} have no nsfw, refuse_nsfw={self.refuse_nsfw} needs it: pass a list that has"
                " the column, or --refuse-nsfw without a value to take every row"
            )
        note = "NULL::VARCHAR"
        if self.refuse_nsfw:
            told = f"coalesce(upper(trim({value['nsfw']})), '')"
            is_untagged = f"{told} NOT IN ({', '.join(map(_literal, NSFW_VALUES))})"
            words = ", ".join(_literal(word.upper()) for word in self.refuse_nsfw)
            refused.append(f"WHEN {told} IN ({words}) THEN 'nsfw'")
            if UNTAGGED in map(str.upper, self.refuse_nsfw):
                refused.append(f"WHEN {is_untagged} THEN 'nsfw'")
            note = f"CASE WHEN {is_untagged} THEN 'nsfw_untagged' END"
        kept = ", ".join(
            f"'{use}': CASE WHEN isfinite({value[use]}) THEN {value[use]} END"
            if use in NUMBERS
            else f"'{use}': {value[use]}"
            for use in KEPT
            if use in value
        )
        extra = (
            f"CASE WHEN refused IS NULL THEN to_json({{{kept}}})::VARCHAR END" if kept else "NULL::VARCHAR"
        )
        return f"""
            SELECT row, {value["url"]} AS url, {value["caption"]} AS caption,
                {value.get("similarity", "NULL::DOUBLE")} AS similarity,
                {value.get("sha256", "NULL::VARCHAR")} AS sha256, {value.get("md5", "NULL::VARCHAR")} AS md5,
                {f"CASE {' '.join(refused)} END" if refused else "NULL::VARCHAR"} AS refused, {extra} AS extra,
                {note} AS note
            FROM {{input}}
        """


def columns_of(columns: Sequence[str]) -> dict[str, str]:
    """Which column serves which use; ValueError for a missing address or text, and for two columns of one use."""
    found: dict[str, str] = {}
    for column in columns:
        for use, names in NAMES.items():
            if column.lower() in names:
                if use in found:
                    raise ValueError(
                        f"columns {found[use]!r} and {column!r} both give the {use}: remove one of them from the list"
                    )
                found[use] = column
    for use in ("url", "caption"):
        if use not in found:
            raise ValueError(
                f"columns {list(columns)} have no {use}, one of {NAMES[use]} must be there: pass parquet parts of"
                " LAION-400M, LAION-2B or Re-LAION"
            )
    return found


def describe(row: Row) -> Described:
    """Caption and scores of one row."""
    extra: Mapping[str, Any] = {name: value for name, value in row.extra.items() if value is not None}
    return (
        (row.caption,) if row.caption else (),
        None,
        {"source": "laion400m", "objects": [], "tags": [], **extra},
    )


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
