"""Is a data set still what was built? Every byte is read again; the first shard and member at fault are named."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image
from tokenizers import Tokenizer

from data_prep.progress import progress_bar
from data_prep.samples import json_bytes
from data_prep.schema import (
    IMAGE_EXTENSIONS,
    KEY_PATTERN,
    MANIFEST_NAME,
    TAR_BLOCK,
    TOKENIZER_FOLDER,
    Manifest,
    Shard,
    parse_manifest,
    read_index,
    sha256_file,
    tags_of,
)

_MEMBER = re.compile(rf"({KEY_PATTERN.pattern})\.([a-z.]+)")


TOLD_WITH = {"cls": "category", "mask.png": "objects"}  # member -> field that its record then needs


class BadDataSet(Exception):
    """What is wrong with a data set: shard, member, rule and remedy in one sentence."""


@dataclass(frozen=True)
class _Member:
    name: str
    key: str
    extension: str
    content: bytes
    start: int  # bytes; of its header in the tar
    end: int  # of its padding


def data_sets(folder: Path) -> list[Path]:
    """`folder` itself when it is a data set, else the data sets right below it; FileNotFoundError for neither."""
    if (folder / MANIFEST_NAME).is_file():
        return [folder]
    below = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}")) if folder.is_dir() else []
    if not below:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: name a data set, or the folder above its splits")
        raise FileNotFoundError(
            f"{folder} holds no {MANIFEST_NAME} (it is written last): run the same `data_prep build` again"
        )
    return below


def check(folder: Path) -> Manifest:
    """The manifest of a data set of which every byte is as built; BadDataSet names the first fault."""
    try:
        manifest = parse_manifest(folder)
    except ValueError as error:
        raise BadDataSet(str(error)) from error
    keys: set[str] = set()
    extensions: Counter[str] = Counter()
    with progress_bar(manifest.num_samples, f"check {folder.name}", "sample") as bar:
        for shard in manifest.shards:
            try:
                _check_shard(folder / shard.name, shard, manifest, keys, extensions, bar.update)
            except (BadDataSet, ValueError, FileNotFoundError) as error:
                remedy = "copy the data set again, or remove the folder and build it again"
                raise BadDataSet(f"{folder / shard.name}: {error}: {remedy}") from error
    for field, extension in {"has_text": "txt", "has_category": "cls"}.items():
        if not getattr(manifest, field) and extensions[extension] == manifest.num_samples:
            raise BadDataSet(
                f"{folder / MANIFEST_NAME}: {field}=false, but every sample has a .{extension}: copy the manifest "
                "again, or build the data set again"
            )
    _check_around(folder, manifest)
    return manifest


def _check_shard(
    path: Path, shard: Shard, manifest: Manifest, keys: set[str], extensions: Counter[str], tick: Callable
) -> None:
    """Adds the shard's keys to `keys` and counts its members by extension."""
    if not path.is_file():
        raise BadDataSet("the shard is missing, the manifest names it")
    offsets = [0]
    with open(path, "rb") as file:
        for key, group in groupby(_members(file), key=lambda member: member.key):
            sample = list(group)
            if key in keys:
                raise BadDataSet(f"member {sample[0].name}: its key was there before")
            keys.add(key)
            _check_sample(key, sample, manifest)
            extensions.update(member.extension for member in sample)
            offsets.append(sample[-1].end)
            tick()
    if len(offsets) - 1 != shard.num_samples:
        raise BadDataSet(f"it holds {len(offsets) - 1} samples, the manifest says {shard.num_samples}")
    if offsets != read_index(path).tolist():
        raise BadDataSet(f"{path.name}.idx does not say where the samples of the shard start")
    if path.stat().st_size != shard.num_bytes:
        raise BadDataSet(f"it has {path.stat().st_size} bytes, the manifest says {shard.num_bytes}")
    if (digest := sha256_file(path)) != shard.sha256:
        raise BadDataSet(
            f"its sha256 is {digest}, the manifest says {shard.sha256}, though every member reads well"
        )


def _members(file: BinaryIO) -> Iterator[_Member]:
    """The members of a tar as this package writes it: plain USTAR headers, zero padding, zeros at the end."""
    last = "the start"
    while True:
        start = file.tell()
        block = file.read(TAR_BLOCK)
        if len(block) < TAR_BLOCK:
            raise BadDataSet(f"it is cut off at byte {start + len(block)}, after member {last}")
        if not any(block):
            if any(file.read()):
                raise BadDataSet(f"there are bytes behind its end, after member {last}")
            return
        shown = block[:100].split(b"\0")[0].decode("ascii", "replace")
        header = _header(block)
        match = _MEMBER.fullmatch(header.name) if header else None
        if header is None or match is None:
            raise BadDataSet(f"member {shown} (byte {start}, after {last}): its tar header is broken")
        padded = -(-header.size // TAR_BLOCK) * TAR_BLOCK
        data = file.read(padded)
        if len(data) < padded:
            raise BadDataSet(f"member {header.name}: it is cut off at byte {start + TAR_BLOCK + len(data)}")
        if any(data[header.size :]):
            raise BadDataSet(f"member {header.name}: its padding is not zero")
        last = header.name
        yield _Member(header.name, match[1], match[2], data[: header.size], start, file.tell())


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The header in a block, None unless it is spelt as the builder spells it."""
    try:
        header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        return header if header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") == block else None
    except (tarfile.HeaderError, ValueError):
        return None


def _check_sample(key: str, sample: list[_Member], manifest: Manifest) -> None:
    parts = {member.extension: member for member in sample}
    image, last = sample[0], sample[-1]
    if image.extension not in IMAGE_EXTENSIONS:
        raise BadDataSet(f"member {key}.{'|'.join(IMAGE_EXTENSIONS)} is missing before {image.name}")
    if last.extension != "json":
        raise BadDataSet(f"member {key}.json is missing after {last.name}")
    record = _record(last)
    told = {"sha256", "size"} | {field for part, field in TOLD_WITH.items() if part in parts}
    if missing := sorted(told - record.keys()):
        raise BadDataSet(f"member {last.name}: it lacks {missing}, which every record of such a sample has")
    checksums = record["crc32"]
    if hashlib.sha256(image.content).hexdigest() != record["sha256"]:
        raise BadDataSet(f"member {image.name}: its sha256 is not that of {last.name}")
    for extension, checksum in checksums.items():
        if extension not in parts:
            raise BadDataSet(f"member {key}.{extension} is missing")
        if extension != "json" and zlib.crc32(parts[extension].content) != checksum:
            raise BadDataSet(f"member {key}.{extension}: its checksum is not that of {last.name}")
    if extra := parts.keys() - checksums.keys() - {image.extension}:
        raise BadDataSet(f"member {key}.{min(extra)} does not belong there")
    needed = {"txt": manifest.has_text, "cls": manifest.has_category}
    for extension, is_needed in needed.items():
        if is_needed and extension not in parts:
            raise BadDataSet(f"member {key}.{extension} is missing, the manifest says every sample has one")
    if "cls" in parts:
        _check_category(parts["cls"], record["category"], manifest.categories)
    if manifest.tags:
        try:
            tags_of(record, manifest.tags)
        except ValueError as error:
            raise BadDataSet(f"member {last.name}: {error}") from error
    _check_pixels(image, parts.get("mask.png"), record)


def _check_category(member: _Member, told: str, categories: tuple[str, ...]) -> None:
    text = member.content.decode("ascii", "replace").strip()
    if not text.isdigit() or int(text) >= len(categories):
        raise BadDataSet(
            f"member {member.name}: category {text!r} must be a number in [0, {len(categories)}), the categories of "
            "the manifest"
        )
    if (name := categories[int(text)]) != told:
        raise BadDataSet(f"member {member.name}: category {text} is {name!r}, the .json says {told!r}")


def _record(member: _Member) -> dict:
    try:
        record = json.loads(member.content)
        bare = {name: value for name, value in record.items() if name != "crc32"}
        is_whole = (
            record["crc32"]["json"] == zlib.crc32(json_bytes(bare)) and json_bytes(record) == member.content
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadDataSet(f"member {member.name}: it is no record of a sample ({error})") from error
    if not is_whole:
        raise BadDataSet(f"member {member.name}: its checksum is not its own")
    return record


def _check_pixels(image: _Member, mask: _Member | None, record: dict) -> None:
    try:
        if image.extension == "jpg":
            height, width = simplejpeg.decode_jpeg(image.content, strict=True).shape[:2]
        else:
            width, height = Image.open(io.BytesIO(image.content)).convert("RGB").size
        if [width, height] != record["size"]:
            raise BadDataSet(
                f"member {image.name}: it has {width} x {height} pixels, the .json says {record['size']}"
            )
        if mask is not None:
            image = mask
            numbers = np.asarray(Image.open(io.BytesIO(mask.content)))
            if numbers.shape != (height, width) or numbers.max() > len(record["objects"]):
                raise BadDataSet(f"member {mask.name}: it does not fit the image and its objects")
    except (OSError, ValueError, SyntaxError) as error:
        raise BadDataSet(f"member {image.name}: it does not decode ({error})") from error


def _check_around(folder: Path, manifest: Manifest) -> None:
    named = {shard.name for shard in manifest.shards}
    if strange := sorted(path.name for path in folder.glob("*.tar") if path.name not in named):
        raise BadDataSet(
            f"{folder / strange[0]} is not in the manifest: remove it, or build the data set again"
        )
    if manifest.has_text:
        try:
            Tokenizer.from_file(str(folder / TOKENIZER_FOLDER / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception for a missing or broken file
            raise BadDataSet(
                f"{folder / TOKENIZER_FOLDER} does not load ({error}): build the data set again"
            ) from error
