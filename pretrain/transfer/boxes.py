"""Do the boxes of a file lie in their images, or does it give corners where COCO's format has sizes?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from pretrain.data.faults import BadSample
from pretrain.transfer.examples import Drops
from pretrain.transfer.formats import FEW
from pretrain.transfer.outlines import FAR, are_real

LEAST_SIDE = 1.0  # pixels of a box inside its image
OVER = 2.0  # pixels over an edge that rounding explains
MOST_CLIPPED = 0.05  # share of boxes that may reach further, where --max-bad is not larger
CORNERS = 0.99  # share of boxes that fit as corners, from which a file is taken to give them

Boxes = Sequence[tuple[list[float], Mapping[str, Any]]]  # [x, y, width, height], and the entry of the image


def check_box(who: str, box: Any, image: Mapping[str, Any]) -> None:
    """Raises BadSample unless a box of an annotation lies in its image, in part at least."""
    far = FAR * max(image["height"], image["width"])
    is_box = isinstance(box, list) and len(box) == 4 and are_real(box, far)
    if not is_box or min(box[2:]) <= 0:
        raise BadSample(
            "bad_box",
            f"{who} has bbox {brief(box)}, it must be [x, y, width, height] in pixels, within +-{far}",
        )
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


def clipped(path: Path, boxes: Boxes, max_bad: float) -> dict[str, int]:
    """Count of the boxes that lose what lies outside of their images, by reason; empty without any.

    ValueError where they are too many: a file with [left, top, right, bottom] gives boxes that are taken, and wrong.
    """
    drops, num_corners = Drops(), 0
    for (left, top, width, height), image in boxes:
        right, bottom = image["width"] + OVER, image["height"] + OVER
        num_corners += left < width <= right and top < height <= bottom
        if min(left, top) < -OVER or left + width > right or top + height > bottom:
            told = f"{[left, top, width, height]} in {image['width']} x {image['height']} pixels"
            drops.add("box_clipped", told)
    fit_as_corners = num_corners >= CORNERS * len(boxes)
    limit = MOST_CLIPPED if fit_as_corners else max(max_bad, MOST_CLIPPED)
    allowed = int(limit * max(len(boxes), FEW))
    if drops.counts.get("box_clipped", 0) > allowed:
        remedy = (
            "all would fit as [left, top, right, bottom]: convert them"
            if fit_as_corners
            else "mend them, or raise --max-bad where things are meant to go on outside"
        )
        raise ValueError(
            f"{path}: {drops.counts['box_clipped']} of {len(boxes)} boxes reach over the edge of their images by "
            f"more than {OVER:g} pixels, first {drops.first['box_clipped']}, where {allowed} may; bbox is "
            f"[x, y, width, height] in pixels: {remedy}"
        )
    return drops.counts
