"""What does a file of annotations in COCO's format say, and which of them can be used?"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath
from reprlib import repr as brief
from typing import Any

import numpy as np
from pycocotools import mask as rle

from data_prep.headers import MAX_PIXELS
from pretrain.data.faults import BadSample
from pretrain.evaluate.apart import resolved
from pretrain.intact import sha256
from pretrain.transfer.boxes import check_box, clipped
from pretrain.transfer.examples import Drops, Example, read_image, repeated
from pretrain.transfer.lvis import federation_of
from pretrain.transfer.outlines import are_real, check_outline

LISTS = ("images", "annotations", "categories")
FORMAT = "https://cocodataset.org/#format-data"


class CocoSet:
    """An AnnotatedSet of one JSON file and the folder that its file names are relative to; boxes, RLE, polygons.

    Federated where it has the fields of LVIS. Read once, so that all that the file alone can tell is told at once. A
    box that reaches over the edge is taken as it is, up to FAR, and counted; one with less than LEAST_SIDE inside is
    left out, as is all that would end the process in a decoder. Raises FileNotFoundError and ValueError.
    """

    def __init__(self, path: Path, images: Path, max_bad: float) -> None:
        self.path = self.place = path
        self.images, self.sha256 = images, sha256(path)
        content = read_lists(path)
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        self.category_ids, self.names = tuple(categories), tuple(categories.values())
        self.federation = federation_of(path, content["images"], content["categories"])
        bad_images, bad_things = Drops(), Drops()
        self._entries = self._readable(content["images"], bad_images)
        bad_images.require_few(f"images of {path}", len(content["images"]), max_bad)
        self.image_ids = tuple(self._entries)
        self.files = resolved(map(self._file, self._entries.values()))
        self.has_masks = any(thing.get("segmentation") for thing in content["annotations"])
        self._things: dict[int, list[dict[str, Any]]] = defaultdict(list)
        missing = {image["id"] for image in content["images"]} - self._entries.keys()
        for thing in content["annotations"]:
            if _number(thing, "image_id") in missing:
                continue  # counted with its image
            try:
                _check_thing(thing, self._entries, categories, self.has_masks)
                self._things[thing["image_id"]].append(thing)
            except BadSample as error:
                bad_things.add(error.reason, str(error))
        bad_things.require_few(f"annotations of {path}", len(content["annotations"]), max_bad)
        boxes = [(thing["bbox"], self._entries[i]) for i, things in self._things.items() for thing in things]
        self.dropped = {**bad_images.counts, **bad_things.counts, **clipped(path, boxes, max_bad)}
        number = {category: place for place, category in enumerate(self.category_ids)}
        self.shown = [
            frozenset(
                number[thing["category_id"]]
                for thing in self._things.get(image, ())
                if not thing.get("iscrowd")
            )
            for image in self.image_ids
        ]
        if not any(self.shown):
            raise ValueError(f"{path} has no annotation that can be used but crowds: name another file")

    def __len__(self) -> int:
        return len(self.image_ids)

    def example(self, index: int) -> Example:
        entry = self._entries[self.image_ids[index]]
        image = read_image(self._file(entry))
        if tuple(image.shape[:2]) != (entry["height"], entry["width"]):
            raise BadSample(
                "image_size",
                f"{self._file(entry)} has {image.shape[0]} x {image.shape[1]} pixels, {self.path} says "
                f"{entry['height']} x {entry['width']}",
            )
        return Example(image.permute(2, 0, 1), index, things=tuple(self._things[entry["id"]]))

    def _readable(self, images: list[dict[str, Any]], drops: Drops) -> dict[int, dict[str, Any]]:
        """The images by number whose files are there."""
        entries = {}
        for image in images:
            try:
                _check_image(image)
                file = self._file(image)
                if not os.path.isfile(file):  # as Path has it, but no error for a name too long
                    raise BadSample("missing_image", f"{file} of image {image['id']}")
                entries[image["id"]] = image
            except BadSample as error:
                drops.add(error.reason, str(error))
        return entries

    def _file(self, image: dict[str, Any]) -> Path:
        """LVIS gives a URL alone, .../train2017/NAME, and takes images of both of COCO's splits."""
        if "file_name" in image:
            return _below(self.images, image["file_name"])
        url = image["coco_url"]
        return _below(self.images.parent, "/".join(url.split("/")[-2:]) if isinstance(url, str) else url)


def _below(folder: Path, name: Any) -> Path:
    """A file of the folder or of one inside it; BadSample for a name that leads elsewhere."""
    place = PurePosixPath(name) if isinstance(name, str) else None
    if place is None or not place.parts or place.is_absolute() or ".." in place.parts:
        raise BadSample("bad_image_entry", f"{brief(name)} names no file below {folder}")
    return folder / place


def _check_image(image: dict[str, Any]) -> None:
    """Raises BadSample where pixels and masks of an entry could not be read."""
    sides = [image.get("height"), image.get("width")]
    is_named = "file_name" in image or "coco_url" in image
    if not is_named or not all(type(side) is int and side > 0 for side in sides):
        raise BadSample("bad_image_entry", f"image {image['id']} needs file_name, height and width")
    if sides[0] * sides[1] > MAX_PIXELS:
        raise BadSample(
            "bad_image_entry",
            f"image {image['id']} has {brief(sides[0])} x {brief(sides[1])} pixels, more than the limit of "
            f"{MAX_PIXELS}",
        )


def read_lists(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of a file in COCO's format, with numbers that are unique."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): name a file in COCO's format, {FORMAT}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in LISTS):
        found = brief(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} holds {found}, but COCO's format has the lists {LISTS}: see {FORMAT}; results of a detector "
            "are no annotations"
        )
    for name in ("images", "categories"):
        ids = [entry.get("id") if isinstance(entry, dict) else None for entry in content[name]]
        is_number = [type(number) is int and abs(number) <= sys.maxsize for number in ids]
        if not ids or not all(is_number) or len(set(ids)) < len(ids):
            raise ValueError(
                f"{path}: its {len(ids)} {name} must each have an integer `id` of its own, of 64 bits: see {FORMAT}"
            )
    if odd := [thing for thing in content["annotations"] if not isinstance(thing, dict)]:
        raise ValueError(f"{path}: its annotations must be objects, not {brief(odd[0])}: see {FORMAT}")
    if not all(isinstance(category.get("name"), str | int | float) for category in content["categories"]):
        raise ValueError(f"{path}: every category must have a `name`: see {FORMAT}")
    if twice := repeated(str(category["name"]) for category in content["categories"]):
        raise ValueError(
            f"{path} names {twice!r} twice: categories are told apart by their names, rename one"
        )
    return content


def _check_thing(
    thing: dict[str, Any], entries: dict[int, dict[str, Any]], categories: dict[int, str], with_masks: bool
) -> None:
    """Raises BadSample with the reason why an annotation cannot be used."""
    who = f"annotation {brief(thing.get('id'))}"
    image = entries.get(_number(thing, "image_id"))
    if image is None:
        raise BadSample(
            "unknown_image", f"{who} is of image {brief(thing.get('image_id'))}, which is not listed"
        )
    if _number(thing, "category_id") not in categories:
        raise BadSample(
            "unknown_category",
            f"{who} is of category {brief(thing.get('category_id'))}, and the listed ones are "
            f"{list(categories)[:10]}",
        )
    if thing.get("iscrowd", 0) not in (0, 1):
        raise BadSample("bad_crowd", f"{who} has iscrowd {brief(thing['iscrowd'])}, it must be 0 or 1")
    if not are_real([thing.get("area", 0)], sys.float_info.max) or thing.get("area", 0) < 0:
        raise BadSample(
            "bad_area", f"{who} has area {brief(thing['area'])}, it must be pixels, 0 or more, or be left out"
        )
    check_box(who, thing.get("bbox"), image)
    if with_masks:
        check_outline(who, thing.get("segmentation"), image["height"], image["width"])


def _number(thing: dict[str, Any], name: str) -> int | float | None:
    """A field of an annotation; None for what is no number, and may not even be looked up."""
    found = thing.get(name)
    return found if type(found) in (int, float) else None


def compressed(outline: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons, uncompressed or compressed RLE -> compressed RLE of an image of height x width."""
    if isinstance(outline, list):
        return rle.merge(rle.frPyObjects(outline, height, width))
    if isinstance(outline["counts"], list):
        return rle.frPyObjects(outline, height, width)
    return outline


def outline_of(mask: np.ndarray) -> dict[str, Any]:
    """A mask uint8 [h, w] of zeros and ones as compressed RLE, fit for JSON."""
    found = rle.encode(np.asfortranarray(mask))
    return {"size": [int(side) for side in found["size"]], "counts": found["counts"].decode("ascii")}
