"""How is Open Images read? A CSV of images, CSVs of labels with confidences, and the names of the classes.

Published: `train-images-boxable-with-rotation.csv` and its like (ImageID, Subset, OriginalURL, ..., OriginalMD5 in
base64, ..., Rotation), label files (ImageID, Source, LabelName, Confidence), and `oidv7-class-descriptions.csv`
(LabelName, DisplayName; older ones without that header). Images lie in the public bucket at <subset>/<id>.jpg; with
--images original they come from Flickr and must have the published MD5. Rotation is in degrees counterclockwise. A
label of confidence 0 was looked for and is not there: it goes to `absent` in the .json, the others to `tags`.

    python -m data_prep build open_images --from train-images-boxable-with-rotation.csv \\
        --labels oidv7-train-annotations-human-imagelabels.csv --names oidv7-class-descriptions.csv \\
        --scratch scratch/open_images --out shards/open_images --max-bad 0.1
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image

from data_prep.download import Described, Download, Row, downloaded
from data_prep.files import sha256_file
from data_prep.images import Checked, check_image
from data_prep.limits import BadImage, Limits
from data_prep.pixels import as_jpeg, as_png, plain
from data_prep.rows import Input, Normalise, expanded, normalised
from data_prep.rows.comma import read_csv
from data_prep.rows.inputs import fetched, quoted
from data_prep.samples import Collection, Dropped, Made
from data_prep.sources.scratch import Scratch

VERSION = 1  # raise it when the same input gives other samples
BUCKET = "https://open-images-dataset.s3.amazonaws.com"
IMAGE_COLUMNS = ("ImageID", "Subset", "OriginalURL", "License", "OriginalMD5", "Rotation")
LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")
TURNS = (0, 90, 180, 270)  # degrees
IS_MD5 = "regexp_full_match(OriginalMD5, '[A-Za-z0-9+/]{22}==')"
MD5_OF = f"CASE WHEN {IS_MD5} THEN lower(hex(from_base64(OriginalMD5))) END"


@dataclass(frozen=True)
class OpenImages:
    """Download a subset of Open Images with its image-level labels."""

    source: Annotated[str, tyro.conf.arg(name="from")]  # the CSV of images with rotation
    labels: tuple[str, ...]  # CSVs of image-level labels, human or machine
    names: str  # class-descriptions.csv
    scratch: Scratch
    images: Literal["bucket", "original"] = "bucket"  # from the bucket, or from Flickr with the published MD5
    bucket: str = BUCKET  # where <subset>/<id>.jpg lies
    split: str = "train"  # name of the split in the manifest; the images of all subsets in the list are taken
    rows: Normalise = field(default_factory=Normalise)
    download: Download = field(default_factory=Download)

    def collections(self) -> list[Collection]:
        """One collection; the list is normalised first, or taken from an earlier run."""
        path = fetched(self.names, self.scratch)
        names = read_names(path)
        settings = {
            "source": "open_images",
            "version": VERSION,
            "images": self.images,
            "bucket": self.bucket,
            "names": sha256_file(path),
        }
        labels = [
            Input(path, LABEL_COLUMNS, partial(read_csv, header=LABEL_COLUMNS))
            for path in expanded(self.labels, "label files")
        ]
        rows = normalised(
            self.scratch / "rows",
            [Input(self.source, IMAGE_COLUMNS, partial(read_csv, header=IMAGE_COLUMNS))],
            self.query,
            self.rows,
            settings,
            prefix=f"openimages-{self.split}",
            has_captions=False,
            sides={"labels": labels},
            allow_private=bool(self.download.allow_private),
        )
        collection = downloaded(
            rows,
            self.scratch / "download",
            self.download,
            partial(describe, names=names),
            name="open_images",
            split=self.split,
            settings=settings,
            block_hashes=self.rows.block_hashes,
            tags=tuple(names.values()),
        )
        return [
            replace(collection, make=partial(make_turned, inner=collection.make, limits=self.download.limits))
        ]

    def query(self, columns: Sequence[str]) -> str:
        """SQL over the images, joined with their labels."""
        where = {
            "bucket": f"{quoted(self.bucket.rstrip('/'))} || '/' || lower(Subset) || '/' || image.ImageID || '.jpg'",
            "original": "OriginalURL",
        }[self.images]
        md5 = MD5_OF if self.images == "original" else "NULL::VARCHAR"
        turns = ", ".join(str(turn) for turn in TURNS)
        return f"""
            WITH scored AS (
                SELECT ImageID, LabelName, max(TRY_CAST(Confidence AS DOUBLE)) AS confidence
                FROM {{labels}} GROUP BY ALL
            ),
            told AS (
                SELECT ImageID, list([LabelName, confidence::VARCHAR] ORDER BY confidence DESC, LabelName) AS labels,
                    bool_and(coalesce(confidence BETWEEN 0 AND 1, false)) AS is_good
                FROM scored GROUP BY ImageID
            ),
            image AS (
                SELECT *, CASE WHEN lower(trim(Rotation)) IN ('', 'nan') THEN 0
                    ELSE TRY_CAST(TRY_CAST(Rotation AS DOUBLE) AS INTEGER) END AS degrees
                FROM {{input}}
            )
            SELECT row, {where} AS url, NULL::VARCHAR AS caption, NULL::DOUBLE AS similarity, NULL::VARCHAR AS sha256,
                {md5} AS md5,
                to_json({{
                    'image_id': image.ImageID, 'license': License, 'rotation': degrees, 'labels': labels
                }})::VARCHAR AS extra,
                CASE WHEN NOT coalesce(is_good, true) THEN 'tags'
                    WHEN NOT coalesce(degrees IN ({turns}), false) THEN 'rotation' END AS refused
            FROM image LEFT JOIN told ON told.ImageID = image.ImageID
        """


def read_names(path: Path) -> dict[str, str]:
    """A different name for every label such as /m/011k07; ValueError for a row without both."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row and row[0] != "LabelName"]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or not row[0].startswith("/"):
            raise ValueError(
                f"{path}: row {number} is {row[:3]}, it must hold a label such as /m/011k07 and a name"
            )
    count = Counter(name.strip() for _, name in rows)
    named = {
        label: name.strip() if count[name.strip()] == 1 else f"{name.strip()} ({label})"
        for label, name in rows
    }
    if not named or len(named) < len(rows):
        raise ValueError(
            f"{path} holds {len(rows)} rows for {len(named)} labels, each must stand there once: download it again"
        )
    return named


def describe(row: Row, *, names: dict[str, str]) -> Described:
    """The tags of one row; labels that the file of names lacks are kept by their id in `unnamed`."""
    extra = dict(row.extra)
    scored = [(label, float(score)) for label, score in extra.pop("labels") or []]
    record = {
        "source": "open_images",
        "objects": [],
        **extra,
        "tags": [[names[label], score] for label, score in scored if label in names and score > 0],
        "absent": [names[label] for label, score in scored if label in names and score == 0],
    }
    if unnamed := [[label, score] for label, score in scored if label not in names]:
        record["unnamed"] = unnamed
    return (), None, record


def make_turned(item: Any, *, inner: Callable[[Any], Made], limits: Limits) -> Made:
    """What `inner` makes, turned by the `rotation` of its record: degrees counterclockwise."""
    made = inner(item)
    sample = made.sample
    if sample is None or not sample.record.get("rotation"):
        return made
    try:
        image = turned(sample.image, sample.extension, sample.record["rotation"], limits)
    except BadImage as bad:
        return Made(None, (*made.dropped, Dropped(sample.key, bad.reason, bad.detail)))
    before = sample.record.get("changed")
    record = {
        **sample.record,
        "phash": image.phash,
        "changed": f"{before}+rotation" if before else "rotation",
    }
    return Made(
        replace(sample, image=image.content, extension=image.extension, size=image.size, record=record),
        made.dropped,
    )


def turned(content: bytes, extension: str, degrees: int, limits: Limits) -> Checked:
    """A checked image turned counterclockwise by a multiple of 90 degrees and encoded again."""
    pixels = np.ascontiguousarray(np.rot90(plain(Image.open(io.BytesIO(content))), degrees // 90))
    encoded = as_jpeg(pixels, "444") if extension == "jpg" else as_png(pixels)
    return check_image(encoded, replace(limits, short_side=0))
