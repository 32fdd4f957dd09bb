"""Where does every image of ImageNet-22k lie? An index pass over tars of synset tars, in parallel, kept as parquet.

Three layouts: one whole tar whose members are `nXXXXXXXX.tar` (fall11_whole.tar), a folder of such tars, or a folder
of both (winter21, unpacked once). Only headers are read; an interrupted pass continues after its last
finished chunk of tars.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.files import write_atomic
from data_prep.places import place_of
from data_prep.rows.inputs import is_folder, split_path
from data_prep.sources.listing import is_image_name
from data_prep.sources.tar_index import BadTar, members_of

VERSION = 2  # of an index on disk; raise it when the same archives give another one
CHUNK = 64  # tars that one task lists
TAR = ".tar"
SCHEMA = pa.schema(
    [
        ("synset", pa.string()),  # the name of its tar
        ("name", pa.string()),  # of the file, without folders
        ("archive", pa.string()),  # path or URL of the outermost file
        ("offset", pa.int64()),  # bytes, in that file
        ("num_bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class SynsetTar:
    """A tar of the images of one synset: a file, or a piece of one."""

    synset: str
    archive: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Index:
    """What the archives hold."""

    tables: tuple[str, ...]  # parquet files with the columns of SCHEMA
    fingerprint: str  # of names, places and sizes of all synset tars, wherever the archives lie
    damaged: tuple[str, ...]  # tars that end or break before their end, each with what is wrong with it


def index_archives(roots: Sequence[str], work: Path, processes: int, max_damaged: int = 0) -> Index:
    """The index of all archives below `roots`, made now or by an earlier run in `work`.

    Raises FileNotFoundError for a root that is not there, ValueError where no synset tar is found, for a whole tar
    that is no tar at all, and for more than `max_damaged` damaged ones; up to so many are printed.
    """
    damaged: list[str] = []
    tars = [tar for root in roots for tar in synset_tars(root, damaged)]
    if not tars:
        raise ValueError(
            f"{list(roots)} hold no synset tars such as n01440764.tar: pass fall11_whole.tar, or a folder of such"
            " tars"
        )
    folder = work / f"index-{_digest([VERSION, *(astuple(tar) for tar in tars)])[:16]}"
    named = [(tar.synset, tar.archive.rpartition("/")[2], tar.offset, tar.num_bytes) for tar in tars]
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [tars[start : start + CHUNK] for start in range(0, len(tars), CHUNK)]
    todo = [number for number in range(len(chunks)) if _damaged(folder, number) != []]  # also mended tars
    if len(todo) < 2 or processes == 1:
        for number in todo:
            _index_chunk(chunks[number], folder, number)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(todo)), context) as pool:
            for done in as_completed(
                [pool.submit(_index_chunk, chunks[number], folder, number) for number in todo]
            ):
                done.result()
    damaged += [one for number in range(len(chunks)) for one in _damaged(folder, number) or ()]
    _require_whole(damaged, max_damaged)
    tables = tuple(str(folder / f"{number:05d}.parquet") for number in range(len(chunks)))
    return Index(tables, _digest(named), tuple(damaged))


def _require_whole(damaged: Sequence[str], max_damaged: int) -> None:
    """Print which tars are damaged; ValueError for more than `max_damaged`."""
    if len(damaged) > max_damaged:
        shown = "; ".join(damaged[:3]) + ("; ..." if len(damaged) > 3 else "")
        raise ValueError(
            f"{len(damaged)} archives are damaged, max_damaged={max_damaged}: {shown}. Copy them again, or pass"
            f" --max-damaged {len(damaged)} to go on without the images that they have lost"
        )
    for one in damaged:
        print(f"damaged, its images from there on are lost: {one}")


def _damaged(folder: Path, number: int) -> list[str] | None:
    """The damaged tars of a chunk; None where it is not listed yet."""
    path = folder / f"{number:05d}.json"
    return json.loads(path.read_text())["damaged"] if path.is_file() else None


def synset_tars(root: str, damaged: list[str]) -> list[SynsetTar]:
    """The synset tars that a whole tar or a folder holds, sorted by synset; a cut whole tar is added to `damaged`."""
    place, name = split_path(root)
    if place.local is not None:  # workers may run in another folder
        root = str(place.local.absolute() / name)
    if place.exists(name):
        return sorted(_inside(root, place.open(name), damaged), key=lambda tar: (tar.synset, tar.offset))
    folder = place_of(root)
    names = folder.names("*" + TAR)
    found: list[SynsetTar] = []
    for one in names:
        if _is_synset(one):
            found.append(SynsetTar(one.removesuffix(TAR), f"{folder}/{one}", 0, folder.size(one)))
        else:
            found += _inside(f"{folder}/{one}", folder.open(one), damaged)
    if not names and not folder.folders():
        told = "holds no tars" if is_folder(folder) else "does not exist"
        raise FileNotFoundError(f"{root} {told}: pass fall11_whole.tar, or a folder of tars")
    return sorted(found, key=lambda tar: (tar.synset, tar.archive, tar.offset))


def _inside(path: str, file: io.BufferedIOBase, damaged: list[str]) -> Iterator[SynsetTar]:
    is_tar = False
    with file:
        try:
            for member in members_of(file):
                is_tar = True
                name = PurePosixPath(member.name).name
                if _is_synset(name):
                    yield SynsetTar(name.removesuffix(TAR), path, member.offset, member.num_bytes)
        except BadTar as error:
            if not is_tar:
                raise ValueError(f"{path}: {error}; pass a plain tar, or copy a broken one again") from error
            damaged.append(f"{path}: {error}")


def _is_synset(name: str) -> bool:
    stem = name.removesuffix(TAR)
    return name.endswith(TAR) and len(stem) == 9 and stem[0] == "n" and stem[1:].isdigit()


def _digest(values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _index_chunk(tars: Sequence[SynsetTar], folder: Path, number: int) -> None:
    """List the images of some synset tars in one table."""
    path = folder / f"{number:05d}.parquet"
    temporary = path.with_name(path.name + ".tmp")
    damaged: list[str] = []
    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for tar in tars:
            rows: list[tuple[str, str, str, int, int]] = []
            place, name = split_path(tar.archive)
            with place.open(name) as file:
                try:
                    for member in members_of(file, tar.offset, tar.num_bytes):
                        image = PurePosixPath(member.name).name
                        if is_image_name(image):
                            rows.append((tar.synset, image, tar.archive, member.offset, member.num_bytes))
                except BadTar as error:
                    damaged.append(f"{tar.synset}{TAR} in {tar.archive}: {error}")
            if rows:
                columns = [
                    pa.array(column, kind)
                    for column, kind in zip(zip(*rows, strict=True), SCHEMA.types, strict=True)
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
    os.replace(temporary, path)
    write_atomic(folder / f"{number:05d}.json", json.dumps({"damaged": damaged}).encode())
