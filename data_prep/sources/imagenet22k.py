"""How is ImageNet-22k read? By an index of its tars, one seeded permutation of all images, and independent shards.

Published: `fall11_whole.tar` (1.31 TB, 21,841 synset tars, 14.2 million images), `winter21_whole.tar.gz` (19,167
synsets; unpack it once: gzip cannot be read from the middle), or the synset tars in a folder. Nothing else is
unpacked. Numbers of classes are those of a frozen table (`synsets.py`; `22k-swin` is what Swin and InternImage
train with), or of the published files ILSVRC2011fall_whole_map_{train,val}.txt. ImageNet-21k-P: classes
`21k-p-fall11` or `21k-p-winter21` with 50 validation images a class, taken by a seeded hash (the published split
was random too). A synset of the table without images in the archives is an error, or allowed by --allow-missing.

    python -m data_prep build imagenet22k --from fall11_whole.tar --scratch scratch/in22k --out shards/in22k
    python -m data_prep build imagenet22k --from winter21_whole --classes 21k-p-winter21 --val-per-class 50 \\
        --scratch scratch/in21kp --out shards/in21kp
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import duckdb
import pyarrow as pa
import tyro

from data_prep.files import sha256_file
from data_prep.labels import fill_prompt
from data_prep.limits import Limits
from data_prep.rows.inputs import fetched, quoted
from data_prep.rows.judge import session
from data_prep.samples import Collection
from data_prep.sources.archives import Index, index_archives
from data_prep.sources.imagenet_maps import SPLITS, read_maps, require_once
from data_prep.sources.picked import OVERHEAD, Items, make_picked, write_items
from data_prep.sources.scratch import Scratch
from data_prep.sources.synsets import CHOICES, SWIN, Classes, classes_of, plain_name, without_images

VERSION = 2  # raise it when the same input gives other samples
MEMORY = 4 * 2**30  # bytes, of the sort


@dataclass(frozen=True)
class ImageNet22k:
    """Read the archives of ImageNet-22k, or of a part of it."""

    source: Annotated[tuple[str, ...], tyro.conf.arg(name="from")]  # whole tars, or folders of synset tars
    scratch: Scratch
    classes: str = SWIN  # table that numbers the classes; images of other synsets are left out, and counted
    # ILSVRC2011fall_whole_map_train.txt [and _val.txt], which give numbers and splits instead
    maps: tuple[str, ...] = ()
    allow_missing: bool = False  # synsets of the classes, or of the maps, may have no image in the archives
    min_images: int = 0  # classes with fewer images have no samples (21k-P: 501)
    val_per_class: int = 0  # images of a class that go to val
    prompts: tuple[str, ...] = ()  # captions of a class: {} becomes "a paper plane" for paper_plane
    seed: int = 0  # of the order, and of the choice for val
    index_processes: int = 2  # that list the archives
    # archives that may be cut off or damaged; the images that they have lost are left out
    max_damaged: int = 0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.classes not in CHOICES:
            raise ValueError(f"classes={self.classes!r} is unknown; choose from {list(CHOICES)}")
        if self.val_per_class < 0 or self.min_images < 0 or self.index_processes < 1:
            raise ValueError(
                f"val_per_class={self.val_per_class}, min_images={self.min_images} must be at least 0,"
                f" index_processes={self.index_processes} at least 1: raise them"
            )
        if self.maps and self.val_per_class:
            raise ValueError(
                f"val_per_class={self.val_per_class}: maps say which images are for val: leave out one of the two"
            )
        if len(self.maps) > len(SPLITS):
            raise ValueError(f"maps={self.maps} are more than two: pass the train map [and the val map]")
        for prompt in self.prompts:
            if "{}" not in prompt:
                raise ValueError(f'prompt {prompt!r} must hold {{}}: pass --prompts "a photo of {{}}."')

    def collections(self) -> list[Collection]:
        """Train, and val where there is one; the index is made first, or taken from an earlier run."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        index = index_archives(self.source, self.scratch, self.index_processes, self.max_damaged)
        maps = [fetched(path, self.scratch) for path in self.maps]
        settings: dict[str, Any] = {
            "source": "imagenet22k",
            "version": VERSION,
            "classes": self.classes,
            "maps": [sha256_file(path) for path in maps],
            "min_images": self.min_images,
            "val_per_class": self.val_per_class,
            "prompts": list(self.prompts),
            "seed": self.seed,
            "limits": asdict(self.limits),
            "inputs_sha256": index.fingerprint,
            "damaged_archives": len(index.damaged),
        }
        listed, classes = self._listed(maps)
        splits = SPLITS if self.val_per_class or len(self.maps) == 2 else SPLITS[:1]
        tables, report = _ordered(index, classes, listed, self, splits)
        settings |= report
        captions = {
            number: tuple(fill_prompt(prompt, plain_name(name)) for prompt in self.prompts)
            for number, name in enumerate(classes.names if self.prompts else ())
        }
        return [
            _collection(split, items, num_bytes, classes, captions, settings, self.limits, len(splits) > 1)
            for split, (items, num_bytes) in tables.items()
        ]

    def _listed(self, maps: list[Path]) -> tuple[Path | None, Classes]:
        """The images that the maps name as a parquet table (None without maps), and the classes."""
        if not maps:
            return None, classes_of(self.classes)
        table = self.scratch / "maps.parquet"
        return table, read_maps(maps, table)


def _ordered(
    index: Index, classes: Classes, listed: Path | None, options: ImageNet22k, splits: tuple[str, ...]
) -> tuple[dict[str, tuple[Items, int]], dict[str, Any]]:
    """The items of every split in their final order with the bytes of their images, and what the manifest tells."""
    numbers = pa.table({"synset": list(classes.synsets), "category": list(range(len(classes.synsets)))})
    tables: dict[str, tuple[Items, int]] = {}
    with session(options.scratch, MEMORY, options.index_processes) as connection:
        connection.register("numbers", numbers)
        images = f"read_parquet([{', '.join(quoted(table) for table in index.tables)}])"
        connection.execute(f"CREATE VIEW image AS FROM {images}")
        expected = set(classes.synsets) - without_images()
        if listed is not None:
            connection.execute(f"CREATE VIEW listed AS FROM read_parquet({quoted(listed)})")
            require_once(connection, options.maps)
            expected = {
                synset for (synset,) in connection.execute("SELECT DISTINCT synset FROM listed").fetchall()
            }
        report = _synsets(connection, expected, options)
        connection.execute(_choice(options, listed is not None))
        report["left_out"] = _left_out(connection, listed is not None, options.min_images)
        for one in splits:
            relation = connection.sql(f"""
                SELECT synset || '/' || name AS name, archive, "offset", num_bytes, category::INTEGER AS category,
                    to_json({{'synset': synset}})::VARCHAR AS extra,
                    CASE WHEN is_again THEN 'duplicate_name' END AS refused
                FROM chosen WHERE num_images >= {options.min_images} AND split = '{one}'
                ORDER BY mix, chosen.name, archive, "offset"
            """)
            items = write_items(relation, options.scratch / f"{one}.parquet", f"imagenet22k-{one}")
            if not len(items):
                raise ValueError(
                    f"{list(options.source)} hold no image for {one} of the {len(classes.synsets)} classes of"
                    f" {options.maps or options.classes}: check --classes and --min-images"
                )
            ((num_bytes,),) = connection.execute(
                f"SELECT sum(least(num_bytes, {options.limits.max_bytes})) FROM read_parquet({quoted(items.path)})"
            ).fetchall()
            tables[one] = (items, int(num_bytes or 0) + OVERHEAD * len(items))
    return tables, report


def _synsets(
    connection: duckdb.DuckDBPyConnection, expected: set[str], options: ImageNet22k
) -> dict[str, Any]:
    """How many synsets should have images and how many do; ValueError where one has none and that is not allowed."""
    there = {synset for (synset,) in connection.execute("SELECT DISTINCT synset FROM image").fetchall()}
    missing = sorted(expected - there)
    told = f"{len(expected) - len(missing)} of {len(expected)} synsets of {options.maps or options.classes}"
    if missing and not options.allow_missing:
        raise ValueError(
            f"{list(options.source)} hold images of {told}, {missing[:3]} are among those without: pass all archives,"
            " other --classes, or --allow-missing to go on without them"
        )
    print(f"imagenet22k: the archives hold images of {told}")
    return {"synsets_expected": len(expected), "synsets_found": len(expected) - len(missing)}


def _choice(options: ImageNet22k, is_listed: bool) -> str:
    """SQL for the table `chosen`: every image of a class or of the maps; `archive` is null for one that is missing.

    Of several members of one name the first counts; the others are refused by a reason.
    """
    of_class = f"""
        SELECT *, CASE WHEN place <= {options.val_per_class} AND NOT is_again THEN 'val' ELSE 'train' END AS split
        FROM counted
    """
    of_map = """
        SELECT synset, name, archive, "offset", num_bytes, coalesce(is_again, false) AS is_again, num_images, split
        FROM listed LEFT JOIN counted USING (synset, name)
    """
    mix = f"md5_number_upper('{options.seed}/' || synset || '/' || name)"
    return f"""
        CREATE TABLE chosen AS
        WITH every AS (
            SELECT *, {mix} AS mix,
                row_number() OVER (PARTITION BY synset, name ORDER BY archive, "offset") > 1 AS is_again
            FROM image
        ),
        counted AS (
            SELECT * EXCLUDE (mix), row_number() OVER (PARTITION BY synset, is_again ORDER BY mix, name) AS place,
                count(*) FILTER (NOT is_again) OVER (PARTITION BY synset) AS num_images
            FROM every
        )
        SELECT synset, name, archive, "offset", num_bytes, is_again, split, category, {mix} AS mix,
            coalesce(max(num_images) OVER (PARTITION BY synset), 0) AS num_images
        FROM ({of_map if is_listed else of_class}) JOIN numbers USING (synset)
    """


def _left_out(connection: duckdb.DuckDBPyConnection, is_listed: bool, min_images: int) -> dict[str, int]:
    """Reason -> images in the archives that no split has, printed; reasons without any are left out."""
    unlisted = "NOT EXISTS (FROM listed WHERE listed.synset = image.synset AND listed.name = image.name)"
    counts = {
        "other_synset": "FROM image WHERE synset NOT IN (SELECT synset FROM numbers)",
        "not_in_map": f"FROM image WHERE synset IN (SELECT synset FROM numbers) AND {unlisted}",
        "few_images": f"FROM chosen WHERE archive IS NOT NULL AND num_images < {min_images}",
    }
    if not is_listed:
        del counts["not_in_map"]
    found = {
        reason: connection.execute(f"SELECT count(*) {rest}").fetchall()[0][0]
        for reason, rest in counts.items()
    }
    found = {reason: count for reason, count in found.items() if count}
    if found:
        print("imagenet22k: images left out: " + ", ".join(f"{n} {reason}" for reason, n in found.items()))
    return found


def _collection(
    split: str,
    items: Items,
    num_bytes: int,
    classes: Classes,
    captions: Mapping[int, tuple[str, ...]],
    settings: Mapping[str, Any],
    limits: Limits,
    is_split: bool,
) -> Collection:
    make = partial(
        make_picked, source="imagenet22k", categories=classes.names, captions=captions, limits=limits
    )
    return Collection(
        "imagenet22k", split, is_split, classes.names, settings, items, make, num_bytes, tags=classes.names
    )
