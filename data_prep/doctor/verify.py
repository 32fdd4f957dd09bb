"""Is one sample of a data set what was built? Its checksums, its labels, its pixels and its perceptual hash."""

from __future__ import annotations

import hashlib
import io
import json
import zlib

import numpy as np
from PIL import Image

from data_prep.doctor.finished import BadDataSet
from data_prep.doctor.members import Member
from data_prep.doctor.perceptual import SAME_PICTURE, recorded_hash, stored_image
from data_prep.images import DAMAGED
from data_prep.labels import tags_of
from data_prep.limits import BadImage
from data_prep.samples import json_bytes
from data_prep.schema import IMAGE_EXTENSIONS, Manifest

TOLD_WITH = {"cls": "category", "mask.png": "objects"}  # member -> field that its record then needs


def verify_sample(key: str, sample: list[Member], manifest: Manifest) -> bool:
    """BadDataSet names the member at fault; true when the perceptual hash of the record was there and verified."""
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
    _verify_checksums(key, parts, record, image, last)
    needed = {"txt": manifest.has_text, "cls": manifest.has_category}
    for extension, is_needed in needed.items():
        if is_needed and extension not in parts:
            raise BadDataSet(f"member {key}.{extension} is missing, the manifest says every sample has one")
    if "cls" in parts:
        _verify_category(parts["cls"], record["category"], manifest.categories)
    if manifest.tags:
        try:
            tags_of(record, manifest.tags)
        except ValueError as error:
            raise BadDataSet(f"member {last.name}: {error}") from error
    found = _verify_pixels(image, parts.get("mask.png"), record)
    return _verify_phash(image, last, record, found)


def _verify_checksums(key: str, parts: dict[str, Member], record: dict, image: Member, last: Member) -> None:
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


def _verify_category(member: Member, told: str, categories: tuple[str, ...]) -> None:
    text = member.content.decode("ascii", "replace").strip()
    if not text.isdigit() or int(text) >= len(categories):
        raise BadDataSet(
            f"member {member.name}: category {text!r} must be a number in [0, {len(categories)}), the categories of "
            "the manifest"
        )
    if (name := categories[int(text)]) != told:
        raise BadDataSet(f"member {member.name}: category {text} is {name!r}, the .json says {told!r}")


def _record(member: Member) -> dict:
    try:
        record = json.loads(member.content)
        bare = {name: value for name, value in record.items() if name != "crc32"}
        is_whole = (
            record["crc32"]["json"] == zlib.crc32(json_bytes(bare)) and json_bytes(record) == member.content
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadDataSet(f"member {member.name}: it is no record of a sample ({error})") from error
    if not is_whole:
        raise BadDataSet(f"member {member.name}: its checksum is not its own")
    return record


def _verify_pixels(image: Member, mask: Member | None, record: dict) -> int:
    """The perceptual hash of what the image shows."""
    try:
        found = stored_image(image.content)
    except BadImage as error:
        raise BadDataSet(f"member {image.name}: training cannot use it ({error})") from error
    width, height = found.size
    if [width, height] != record["size"]:
        raise BadDataSet(
            f"member {image.name}: it has {width} x {height} pixels, the .json says {record['size']}"
        )
    if mask is not None:
        try:
            numbers = np.asarray(Image.open(io.BytesIO(mask.content)))
        except DAMAGED as error:
            raise BadDataSet(f"member {mask.name}: it does not decode ({error})") from error
        if numbers.shape != (height, width) or numbers.max() > len(record["objects"]):
            raise BadDataSet(f"member {mask.name}: it does not fit the image and its objects")
    return int(found.phash, 16)


def _verify_phash(image: Member, last: Member, record: dict, found: int) -> bool:
    try:
        recorded = recorded_hash(record)
    except ValueError as error:
        raise BadDataSet(f"member {last.name}: {error}") from error
    if recorded is None:
        return False
    if (distance := (found ^ recorded).bit_count()) > SAME_PICTURE:
        raise BadDataSet(
            f"member {last.name}: its phash {recorded:016x} is {distance} bits from that of {image.name}, "
            f"{found:016x}; {SAME_PICTURE} may differ between versions of a decoder"
        )
    return True
