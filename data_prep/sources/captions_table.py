"""What does a captions.tsv say? Rows of image, caption and more, read so that one bad row costs only itself.

Tab-separated without quoting; the header names the columns, `image` and `caption` must be among them. Several
rows for one image are several captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_prep.rows.captions import plain
from data_prep.rows.lines import decoded

IMAGE_COLUMN, CAPTION_COLUMN = "image", "caption"
MAX_EXTRA = 1000  # characters; longer values of other columns are not kept


@dataclass
class Told:
    """What the table says of one image; captions are still the bytes of the file."""

    captions: list[bytes] = field(default_factory=list)
    extra: dict[str, str] = field(
        default_factory=dict
    )  # other columns of its first row, those that are short


def read_table(content: bytes, name: str) -> tuple[dict[str, Told], list[str]]:
    """(what is told by image name, rows with a wrong number of columns as "row N"); ValueError for a bad header."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    header = [column.decode("utf-8", "replace").strip() for column in lines[0].rstrip(b"\r").split(b"\t")]
    for needed in (IMAGE_COLUMN, CAPTION_COLUMN):
        if needed not in header:
            raise ValueError(
                f"{name}: columns {[column[:40] for column in header[:5]]} lack {needed!r}: the first line must name "
                f"tab-separated columns, {IMAGE_COLUMN} and {CAPTION_COLUMN} among them, in UTF-8"
            )
    told: dict[str, Told] = {}
    bad: list[str] = []
    for number, line in enumerate(lines[1:], start=2):
        line = line.rstrip(b"\r")
        if not line:
            continue
        cells = line.split(b"\t")
        if len(cells) != len(header):
            bad.append(f"row {number}")
            continue
        row = dict(zip(header, cells, strict=True))
        image = row.pop(IMAGE_COLUMN).decode("utf-8", "surrogateescape")
        caption = row.pop(CAPTION_COLUMN)
        entry = told.setdefault(image, Told(extra=_short(row)))
        entry.captions.append(caption)
    return told, bad


def clean_caption(raw: bytes) -> str:
    """A caption as text on one line, by the rules of all sources: UTF-8, or else Windows-1252; NFC."""
    return plain(decoded(raw))


def _short(row: Mapping[str, bytes]) -> dict[str, str]:
    values = {name: cell.decode("utf-8", "replace") for name, cell in row.items()}
    return {name: value for name, value in values.items() if len(value) <= MAX_EXTRA}
