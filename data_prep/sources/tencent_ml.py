"""How is Tencent ML-Images read? Scored tags for images of Open Images (by address) and of ImageNet (by file id).

Published: `train_urls_from_openimages.txt` (6.9 million) and `val_urls...`, lines of
`URL<TAB>id:score<TAB>id:score...`; `train_image_id_from_imagenet.txt` (10.7 million) and `val_...`, lines of
`n04310904/n04310904_8388.JPEG<TAB>id:1...`; some copies have spaces for tabs, a score that is missing is 1.
`dictionary_and_semantic_hierarchy.txt` names the 11,166 tags: a header, then `id<TAB>synset or /m/ id<TAB>parent's
id (-1 = root)<TAB>name`. The ImageNet part needs the archives that `imagenet22k` reads. Each list becomes a data
set of its own: `train-openimages`, `val-imagenet`, ...

    python -m data_prep build tencent_ml --dictionary dictionary_and_semantic_hierarchy.txt \\
        --urls train_urls_from_openimages.txt --image-ids train_image_id_from_imagenet.txt \\
        --archives fall11_whole.tar --scratch scratch/tencent --out shards/tencent --max-bad 0.6
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.download import Described, Download, Row, downloaded
from data_prep.files import sha256_file
from data_prep.rows import Input, Normalise, normalised
from data_prep.rows.inputs import fetched, quoted, staged
from data_prep.rows.judge import session
from data_prep.rows.lines import BadLine, read_lines
from data_prep.samples import Collection, Made
from data_prep.sources.archives import index_archives
from data_prep.sources.picked import OVERHEAD, Item, make_picked, write_items
from data_prep.sources.scratch import Scratch

VERSION = 1  # raise it when the same input gives other samples
DICTIONARY_COLUMNS = 4
_TAG = re.compile(r"(\d+)(?::(\d+(?:\.\d*)?(?:[eE]-?\d+)?))?")


@dataclass(frozen=True)
class Dictionary:
    """The tags by id: a different name for each, and its parent's id (-1: a root)."""

    names: tuple[str, ...]
    ids: tuple[str, ...]  # synset, or /m/...
    parents: tuple[int, ...]


@dataclass(frozen=True)
class TencentMl:
    """Read one part of Tencent ML-Images, or both."""

    dictionary: str  # dictionary_and_semantic_hierarchy.txt
    scratch: Scratch
    urls: tuple[str, ...] = ()  # train_urls_from_openimages.txt [and val_...]
    image_ids: tuple[str, ...] = ()  # train_image_id_from_imagenet.txt [and val_...]
    archives: tuple[str, ...] = ()  # of ImageNet-22k: whole tars, or folders of synset tars
    index_processes: int = 2  # that list the archives
    # archives that may be cut off or damaged; the images that they have lost are left out
    max_damaged: int = 0
    rows: Normalise = field(default_factory=Normalise)
    download: Download = field(default_factory=Download)

    def __post_init__(self) -> None:
        if not self.urls and not self.image_ids:
            raise ValueError("neither --urls nor --image-ids is given: pass the lists of one part or of both")
        if bool(self.image_ids) != bool(self.archives):
            raise ValueError("--image-ids and --archives go together: pass both, or neither")

    def collections(self) -> list[Collection]:
        """One collection a list, in the order of the command line."""
        path = fetched(self.dictionary, self.scratch)
        dictionary = read_dictionary(path)
        settings = {"source": "tencent_ml", "version": VERSION, "dictionary": sha256_file(path)}
        made = [self._of_urls(path, dictionary, settings) for path in self.urls]
        made += [self._of_image_ids(path, dictionary, settings) for path in self.image_ids]
        if len({one.split for one in made}) < len(made):
            raise ValueError(f"lists {[*self.urls, *self.image_ids]} name a split twice: pass each list once")
        return made

    def _of_urls(self, path: str, dictionary: Dictionary, settings: dict[str, Any]) -> Collection:
        split = _split_of(path, "openimages")
        table = Input(path, ("url", "tags"), partial(read_lines, num_columns=2, split=_reader(dictionary)))
        rows = normalised(
            self.scratch / split / "rows",
            [table],
            url_query,
            self.rows,
            settings,
            prefix=f"tencent-{split}",
            has_captions=False,
            allow_private=bool(self.download.allow_private),
        )
        return downloaded(
            rows,
            self.scratch / split / "download",
            self.download,
            partial(describe, names=dictionary.names),
            name="tencent_ml",
            split=split,
            settings=settings,
            block_hashes=self.rows.block_hashes,
            tags=dictionary.names,
            has_split_folder=True,
        )

    def _of_image_ids(self, path: str, dictionary: Dictionary, settings: dict[str, Any]) -> Collection:
        split = _split_of(path, "imagenet")
        work, limits = self.scratch / split, self.download.limits
        work.mkdir(parents=True, exist_ok=True)
        index = index_archives(self.archives, self.scratch, self.index_processes, self.max_damaged)
        local = fetched(path, work)
        digest = sha256_file(local)
        table = Input(path, ("file", "tags"), partial(read_lines, num_columns=2, split=_reader(dictionary)))
        listed = staged(table, local, work, f"list-{digest[:16]}")
        with session(work, self.rows.memory_bytes * 3 // 5, self.rows.metadata_threads) as connection:
            connection.execute(f"CREATE TABLE list AS {_IMAGE_IDS.format(listed=listed.sql)}")
            relation = connection.sql(_items_query(index.tables, listed.rejects, self.rows.seed))
            items = write_items(relation, work / "items.parquet", f"tencent-{split}")
            ((num_bytes,),) = connection.execute(
                f"SELECT sum(least(num_bytes, {limits.max_bytes})) FROM read_parquet({quoted(items.path)})"
            ).fetchall()
        return Collection(
            name="tencent_ml",
            split=split,
            has_split_folder=True,
            categories=(),
            settings={
                **settings,
                "seed": self.rows.seed,
                "limits": asdict(limits),
                "list_sha256": digest,
                "inputs_sha256": index.fingerprint,
                "damaged_archives": len(index.damaged),
            },
            items=items,
            make=partial(make_tagged, names=dictionary.names, limits=limits),
            num_bytes=int(num_bytes or 0) + OVERHEAD * len(items),
            tags=dictionary.names,
        )


def read_dictionary(path: Path) -> Dictionary:
    """The tags of dictionary_and_semantic_hierarchy.txt; ValueError for ids out of order or a parent that is none."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    rows = [line.split("\t") for line in lines[1:] if line.strip()]
    for number, row in enumerate(rows):
        if len(row) != DICTIONARY_COLUMNS or row[0].strip() != str(number):
            raise ValueError(
                f"{path}: row {number} is {row[:4]}, it must hold {number}, an id, its parent's number and a name,"
                " tab-separated, below a header: pass dictionary_and_semantic_hierarchy.txt"
            )
        if not re.fullmatch(r"-?\d+", row[2].strip()) or not -1 <= int(row[2]) < len(rows):
            raise ValueError(
                f"{path}: row {number} has the parent {row[2]!r}, one of -1 to {len(rows) - 1} must stand there"
            )
    if not rows:
        raise ValueError(f"{path} holds no tags: pass dictionary_and_semantic_hierarchy.txt")
    plain = [row[3].strip() for row in rows]
    twice = {name for name in plain if plain.count(name) > 1} if len(set(plain)) < len(plain) else set()
    names = tuple(
        f"{name} ({row[1].strip()})" if name in twice else name for name, row in zip(plain, rows, strict=True)
    )
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two tags have one id and one name: pass the published dictionary")
    return Dictionary(names, tuple(row[1].strip() for row in rows), tuple(int(row[2]) for row in rows))


def scored_tags(line: str, num_tags: int) -> list[str]:
    """A line as [address or file, JSON of [[id, score], ...]]; the last of several scores of one tag counts.

    Split on any whitespace. Raises BadLine: no_tags, tags (not id:score with an id of the dictionary and a score in
    [0, 1]).
    """
    first, *told = line.split() or [""]
    if not told:
        raise BadLine("no_tags")
    scores: dict[int, float] = {}
    for text in told:
        found = _TAG.fullmatch(text)
        if found is None:
            raise BadLine("tags")
        tag, score = int(found[1]), 1.0 if found[2] is None else float(found[2])
        if tag >= num_tags or score > 1:
            raise BadLine("tags")
        scores[tag] = score
    return [first, json.dumps(list(scores.items()), separators=(",", ":"))]


def url_query(columns: Sequence[str]) -> str:
    """SQL over a list of addresses with tags."""
    return """
        SELECT row, url, NULL::VARCHAR AS caption, NULL::DOUBLE AS similarity, NULL::VARCHAR AS sha256,
            NULL::VARCHAR AS md5, '{"labels":' || tags || '}' AS extra, NULL::VARCHAR AS refused
        FROM {input}
    """


def describe(row: Row, *, names: tuple[str, ...]) -> Described:
    """The tags of one row."""
    return (), None, {"source": "tencent_ml", "objects": [], "tags": _named(row.extra["labels"], names)}


def make_tagged(item: Item, *, names: tuple[str, ...], limits: Any) -> Made:
    """The sample of one image of ImageNet with its tags by name."""
    made = make_picked(item, source="tencent_ml", categories=(), captions={}, limits=limits)
    if made.sample is None:
        return made
    record = dict(made.sample.record)
    record["tags"] = _named(record.pop("labels"), names)
    return Made(replace(made.sample, record=record), made.dropped)


def _named(labels: list[list[float]], names: tuple[str, ...]) -> list[list[Any]]:
    return [[names[int(tag)], score] for tag, score in labels]


def _reader(dictionary: Dictionary) -> Any:
    return partial(scored_tags, num_tags=len(dictionary.names))


def _split_of(path: str, part: str) -> str:
    """`train-openimages` for train_urls_from_openimages.txt; ValueError for a name without train or val."""
    name = path.rpartition("/")[2]
    found = re.match(r"(train|val)", name)
    if found is None:
        raise ValueError(f"{path}: the name must begin with train or val, as published: rename the file")
    return f"{found[1]}-{part}"


_IMAGE_IDS = """
    SELECT row, file, tags, regexp_extract(file, '[^/]*$') AS image,
        row_number() OVER (PARTITION BY regexp_extract(file, '[^/]*$') ORDER BY row) > 1 AS is_again
    FROM {listed}
"""


def _items_query(tables: Sequence[str], rejects: Path, seed: int) -> str:
    """SQL of all lines of the list `list`, in their seeded order, with the places of their images."""
    images = f"read_parquet([{', '.join(quoted(table) for table in tables)}])"
    return f"""
        WITH found AS (
            SELECT name AS image, min_by(archive, (archive, "offset")) AS archive,
                min_by("offset", (archive, "offset")) AS "offset", min_by(num_bytes, (archive, "offset")) AS num_bytes
            FROM {images} WHERE name IN (SELECT image FROM list) GROUP BY name
        ),
        every AS (
            SELECT file AS name, archive, "offset", num_bytes, '{{"labels":' || tags || '}}' AS extra,
                CASE WHEN is_again THEN 'duplicate_name' END AS refused, row
            FROM list LEFT JOIN found USING (image)
            UNION ALL
            SELECT 'line ' || row, NULL, NULL, NULL, NULL, reason, row FROM read_parquet({quoted(rejects)})
        )
        SELECT name, archive, "offset", num_bytes, NULL::INTEGER AS category, extra, refused
        FROM every ORDER BY md5_number_upper('{seed}/' || name), row
    """
