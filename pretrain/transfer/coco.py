"""What does a file of annotations in COCO's format say, and which of them can be used?"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from pretrain.data.faults import BadSample
from pretrain.intact import sha256
from pretrain.transfer.examples import Drops, Example, read_image, repeated, resolved
from pretrain.transfer.lvis import federation_of

LISTS = ("images", "annotations", "categories")
FORMAT = "https://cocodataset.org/#format-data"
LEAST_SIDE = 1.0  # pixels of a box inside its image


class CocoSet:
    """An AnnotatedSet of one JSON file and the folder that its file names are relative to; boxes, RLE, polygons.

    Federated where it has the fields of LVIS. Read once, so that all that the file alone can tell is told at once. A
    box that reaches over the edge is taken as it is; one with less than LEAST_SIDE inside is left out. Raises
    FileNotFoundError and ValueError.
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
            if thing.get("image_id") in missing:
                continue  # counted with its image
            try:
                _check_thing(thing, self._entries, categories, self.has_masks)
                self._things[thing["image_id"]].append(thing)
            except BadSample as error:
                bad_things.add(error.reason, str(error))
        bad_things.require_few(f"annotations of {path}", len(content["annotations"]), max_bad)
        self.dropped = {**bad_images.counts, **bad_things.counts}
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
            sides = (image.get("height"), image.get("width"))
            is_named = "file_name" in image or "coco_url" in image
            if not is_named or not all(type(side) is int and side > 0 for side in sides):
                drops.add("bad_image_entry", f"image {image['id']} needs file_name, height and width")
            elif not self._file(image).is_file():
                drops.add("missing_image", f"{self._file(image)} of image {image['id']}")
            else:
                entries[image["id"]] = image
        return entries

    def _file(self, image: dict[str, Any]) -> Path:
        """LVIS gives a URL alone, .../train2017/NAME, and takes images of both of COCO's splits."""
        if "file_name" in image:
            return self.images / str(image["file_name"])
        return self.images.parent.joinpath(*str(image["coco_url"]).split("/")[-2:])


def read_lists(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of a file in COCO's format, with numbers that are unique."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): name a file in COCO's format, {FORMAT}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in LISTS):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} holds {found}, but COCO's format has the lists {LISTS}: see {FORMAT}; results of a detector "
            "are no annotations"
        )
    for name in ("images", "categories"):
        ids = [entry.get("id") if isinstance(entry, dict) else None for entry in content[name]]
        if not ids or not all(type(number) is int for number in ids) or len(set(ids)) < len(ids):
            raise ValueError(
                f"{path}: its {len(ids)} {name} must each have an integer `id` of its own: see {FORMAT}"
            )
    if odd := [thing for thing in content["annotations"] if not isinstance(thing, dict)]:
        raise ValueError(f"{path}: its annotations must be objects, not {str(odd[0])[:40]}: see {FORMAT}")
    if any("name" not in category for category in content["categories"]):
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
    who = f"annotation {thing.get('id')!r}"
    image = entries.get(thing.get("image_id"))
    if image is None:
        raise BadSample("unknown_image", f"{who} is of image {thing.get('image_id')!r}, which is not listed")
    if thing.get("category_id") not in categories:
        raise BadSample(
            "unknown_category",
            f"{who} is of category {thing.get('category_id')!r}, and the listed ones are {list(categories)[:10]}",
        )
    if thing.get("iscrowd", 0) not in (0, 1):
        raise BadSample("bad_crowd", f"{who} has iscrowd {thing['iscrowd']!r}, it must be 0 or 1")
    box = thing.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
    if not is_box or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
        raise BadSample("bad_box", f"{who} has bbox {box!r}, it must be [x, y, width, height] in pixels")
    left, top, width, height = box
    inside = (
        min(left + width, image["width"]) - max(left, 0),
        min(top + height, image["height"]) - max(top, 0),
    )
    if min(inside) < LEAST_SIDE:
        raise BadSample(
            "box_outside",
            f"{who} has bbox {box}, outside of image {image['id']} of {image['width']} x {image['height']} pixels",
        )
    if with_masks:
        _check_outline(who, thing.get("segmentation"), image)


def _check_outline(who: str, outline: Any, image: dict[str, Any]) -> None:
    size = [image["height"], image["width"]]
    match outline:
        case {"size": found, "counts": str() | list()}:
            if list(found) != size:
                raise BadSample("mask_size", f"{who} has a mask of {found}, its image has {size}")
            _check_runs(who, outline)
        case [*polygons] if polygons and all(
            isinstance(p, list) and len(p) >= 6 and not len(p) % 2 for p in polygons
        ):
            pass
        case _:
            raise BadSample(
                "bad_mask", f"{who} has segmentation {str(outline)[:60]}: it must be polygons or RLE"
            )


def _check_runs(who: str, outline: dict[str, Any]) -> None:
    """Raises BadSample unless the runs of an RLE are whole numbers that cover the image once."""
    counts, pixels = outline["counts"], math.prod(outline["size"])
    if isinstance(counts, list):
        if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != pixels:
            raise BadSample(
                "bad_mask",
                f"{who} has an RLE of {str(counts)[:40]}, whose runs must sum to its {pixels} pixels",
            )
        return
    try:
        if not counts:  # which the decoder takes, and reads beyond
            raise ValueError("it is empty")
        rle.decode(outline)
    except (ValueError, UnicodeError) as error:
        raise BadSample("bad_mask", f"{who} has a broken RLE {str(counts)[:40]!r}: {error}") from error


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
