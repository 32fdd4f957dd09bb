"""How does a description of data sets look as a page: random samples, duplicates side by side, histograms?"""

from __future__ import annotations

import json
from collections.abc import Sequence

from data_prep.doctor.duplicates import Duplicates
from data_prep.doctor.finished import BadDataSet
from data_prep.doctor.members import read_sample
from data_prep.doctor.page import Page
from data_prep.doctor.published import Row, table
from data_prep.doctor.tell import as_text
from data_prep.places import Place
from data_prep.stats import Description

MOST_GROUPS = 16  # of duplicates, of each kind
MOST_OF_GROUP = 4  # pictures


def stats_page(descriptions: Sequence[Description], rows: Sequence[Row]) -> str:
    """One self-contained HTML file about some data sets, with the table beside the papers' counts."""
    page = Page(
        "Data sets: " + ", ".join(f"{one.manifest.name}/{one.manifest.split}" for one in descriptions)
    )
    if rows:
        page.text(table(rows))
    for described in descriptions:
        _section(page, described)
    return page.html()


def _section(page: Page, described: Description) -> None:
    manifest, summary = described.manifest, described.summary
    page.heading(f"{manifest.name}/{manifest.split}")
    page.text(as_text(described))
    page.heading("Random samples")
    page.pictures([_picture(described, number) for number in described.chosen])
    for title, found in {"The same bytes": described.exact, "Look alike": described.near}.items():
        if found is not None and found.num_groups:
            page.heading(f"{title}: {found.num_groups:,} groups, the largest")
            page.groups(_groups(described, found))
    page.heading("Histograms")
    for title, counts in {
        "width, pixels": summary.widths,
        "height, pixels": summary.heights,
        "bytes of an image": summary.image_bytes,
        "words of a caption": summary.words,
        "language of a caption (estimated, of a few)": summary.languages,
        "samples of a category": summary.categories,
        "samples with a tag": summary.tags,
        "score of a tag": summary.scores,
        "left out, by reason": dict(manifest.dropped),
        **{name: values.numbers or values.texts or {} for name, values in sorted(summary.fields.items())},
    }.items():
        page.histogram(title, counts)


def _groups(described: Description, found: Duplicates) -> list[list[tuple[bytes, str, str]]]:
    return [
        [_picture(described, number) for number in group[:MOST_OF_GROUP]]
        for group in found.examples[:MOST_GROUPS]
    ]


def _picture(described: Description, number: int) -> tuple[bytes, str, str]:
    return picture_of(described.place, *described.locate(number))


def picture_of(place: Place, shard: str, number: int) -> tuple[bytes, str, str]:
    """Image, caption or category, and key with shard of a sample; BadDataSet is told in place of the caption."""
    try:
        members = read_sample(place, shard, number)
    except BadDataSet as error:
        return b"", str(error), f"{shard} {number}"
    record = json.loads(members[-1].content)
    captions = record.get("captions") or [record.get("category", "")]
    return members[0].content, captions[0], f"{members[0].key} in {shard}"
