"""How large are the public data sets by their papers, and how much of each is here?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.schema import Manifest


@dataclass(frozen=True)
class Published:
    """A data set as its authors count it."""

    num_images: int  # image-text pairs, or images
    num_classes: int  # 0 without
    source: str


_TENCENT = "Tencent ML-Images (Wu et al. 2019)"
PUBLISHED: Mapping[tuple[str, str], Published] = {  # name and split of a data set
    ("laion400m", "train"): Published(
        413_000_000, 0, "LAION-400M (Schuhmann et al. 2021), rows of the metadata"
    ),
    ("cc12m", "train"): Published(12_400_000, 0, "Conceptual 12M (Changpinyo et al. 2021)"),
    ("yfcc15m", "train"): Published(14_829_396, 0, "YFCC-15M, the list of CLIP (Radford et al. 2021)"),
    ("imagenet22k", "train"): Published(14_200_000, 21_841, "ImageNet, fall 2011 (image-net.org)"),
    ("tencent_ml", "train-openimages"): Published(6_902_811, 11_166, f"{_TENCENT}, its list of URLs"),
    ("tencent_ml", "train-imagenet"): Published(
        10_706_941, 11_166, f"{_TENCENT}, its list of ImageNet's files"
    ),
}
SUMS: Mapping[str, tuple[Published, tuple[tuple[str, str], ...]]] = {  # what is used together, and its parts
    "image-text pairs": (  # 400M + 15M + 12M; the lists of the three hold 440M rows
        Published(427_000_000, 0, "M3I (arXiv 2211.09807)"),
        (("laion400m", "train"), ("yfcc15m", "train"), ("cc12m", "train")),
    ),
    "image-category": (Published(15_000_000, 0, "M3I (arXiv 2211.09807)"), (("imagenet22k", "train"),)),
    "Tencent train": (
        Published(17_609_752, 11_166, _TENCENT),
        (("tencent_ml", "train-openimages"), ("tencent_ml", "train-imagenet")),
    ),
    "Tencent val": (
        Published(88_739, 11_166, _TENCENT),
        (("tencent_ml", "val-openimages"), ("tencent_ml", "val-imagenet")),
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: what is here beside what was published."""

    name: str
    num_here: int
    num_published: int
    classes_here: int
    classes_published: int
    source: str

    @property
    def share(self) -> float:
        """Of the published images, what is here."""
        return self.num_here / self.num_published


def beside_papers(found: Sequence[tuple[Manifest, int]]) -> list[Row]:
    """A row of every data set whose published size is known, then of the sums that are used together.

    `found` has data sets with the number of categories, or tags, that at least one of their samples has.
    """
    here = {(manifest.name, manifest.split): (manifest, num_classes) for manifest, num_classes in found}
    rows = [
        Row(
            f"{name}/{split}", one.num_samples, known.num_images, num_classes, known.num_classes, known.source
        )
        for (name, split), (one, num_classes) in here.items()
        if (known := PUBLISHED.get((name, split)))
    ]
    for name, (known, parts) in SUMS.items():
        if some := [here[part] for part in parts if part in here]:
            told = " + ".join(sorted({manifest.name for manifest, _ in some}))
            total = sum(manifest.num_samples for manifest, _ in some)
            classes = max(num_classes for _, num_classes in some)
            rows.append(
                Row(f"{name} ({told})", total, known.num_images, classes, known.num_classes, known.source)
            )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text, "" without any."""
    if not rows:
        return ""
    lines = [
        f"{'beside the papers':44} {'here':>13} {'published':>13} {'share':>9}  classes here / published, source"
    ]
    for row in rows:
        classes = f"{row.classes_here:,} / {row.classes_published:,}, " if row.classes_published else ""
        lines.append(
            f"{row.name:44} {row.num_here:13,} {row.num_published:13,} {row.share:9.3%}  {classes}{row.source}"
        )
    return "\n".join(lines)
