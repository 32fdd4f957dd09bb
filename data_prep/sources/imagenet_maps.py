"""What do the published maps of ImageNet-22k say? Which image has which class number, and in which split.

ILSVRC2011fall_whole_map_train.txt and ILSVRC2011fall_whole_map_val.txt, as Swin and InternImage train with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.rows.lines import BLOCK, open_compressed
from data_prep.sources.synsets import SWIN, Classes, classes_of, named

SPLITS = ("train", "val")
_PAIR = re.compile(rb'\[\s*"([^"]+)"\s*,\s*(\d+)\s*\]|^([^\s\[]+\.\w+)[ \t]+(\d+)[ \t]*\r?$', re.MULTILINE)


def read_maps(paths: list[Path], table: Path) -> Classes:
    """Write which image has which class in which split, as parquet; the classes that this says.

    Columns synset, name, split. A map holds `n02119789/n02119789_10.JPEG<TAB>13`, a line an image, or the same pairs
    as one JSON list. ValueError for a synset with two numbers and for a file without pairs.
    """
    number: dict[str, int] = {}
    schema = pa.schema([("synset", pa.string()), ("name", pa.string()), ("split", pa.string())])
    with pq.ParquetWriter(table, schema, compression="zstd") as writer:
        for split, path in zip(SPLITS, paths, strict=False):
            synsets, names = [], []
            for name, value in _pairs(path):
                file = name.rpartition("/")[2]
                synset = file.partition("_")[0]
                if number.setdefault(synset, value) != value:
                    raise ValueError(
                        f"{path}: {synset} has the numbers {number[synset]} and {value}: pass maps of one numbering"
                    )
                synsets.append(synset)
                names.append(file)
            if not names:
                raise ValueError(
                    f"{path} holds no pairs of image and class: pass ILSVRC2011fall_whole_map_{split}.txt"
                )
            columns = [pa.array(column) for column in (synsets, names, [split] * len(names))]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    synsets = sorted(number, key=lambda synset: number[synset])
    taken = [number[synset] for synset in synsets]
    if len(set(taken)) != len(taken):
        raise ValueError(f"{paths[0]}: two synsets have one number: pass the published map")
    if taken != list(range(len(taken))):  # a part of the map: the table says who has the other numbers
        whole = classes_of(SWIN)
        if any(whole.number.get(synset) != value for synset, value in number.items()):
            raise ValueError(
                f"{paths[0]}: numbers are neither 0, 1, ... without a gap nor those of {SWIN}: pass both maps"
            )
        return whole
    return named(tuple(synsets))


def require_once(connection: duckdb.DuckDBPyConnection, paths: Sequence[str]) -> None:
    """ValueError when the relation `listed`, as `read_maps` wrote it, names an image twice, in one map or in both."""
    twice = connection.execute(
        "SELECT synset, name, string_agg(split, ' and ' ORDER BY split) FROM listed GROUP BY ALL"
        " HAVING count(*) > 1 ORDER BY ALL LIMIT 1"
    ).fetchall()
    if twice:
        ((synset, name, splits),) = twice
        raise ValueError(
            f"{list(paths)}: {synset}/{name} is listed for {splits}, an image must be listed once: remove the"
            " repeated lines, or pass the published maps"
        )


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    """(image, class) of a map, read in pieces."""
    rest = b""
    with open_compressed(path) as file:
        while content := file.read(BLOCK):
            content = rest + content
            end = max(content.rfind(b"\n"), content.rfind(b"]")) + 1
            content, rest = content[:end], content[end:]
            yield from _matches(content)
    yield from _matches(rest)


def _matches(content: bytes) -> Iterator[tuple[str, int]]:
    for found in _PAIR.finditer(content):
        name, value = (found[1], found[2]) if found[1] else (found[3], found[4])
        yield name.decode("utf-8", "replace"), int(value)
