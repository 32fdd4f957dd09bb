"""Can an annotation's numbers and outline be handed to pycocotools, which takes memory for whatever they say?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from reprlib import repr as brief
from typing import Any

import numpy as np

from pretrain.data.faults import BadSample

FAR = 4  # longer sides of its image, from the corner, within which an outline or a box must lie
GROUPS = 7  # characters, of five bits each, of the largest number in a compressed RLE


def are_real(numbers: Sequence[Any], limit: float) -> bool:
    """Are all finite numbers of JSON within +-limit? Truth values and text are none."""
    return (
        set(map(type, numbers)) <= {int, float}
        and -limit <= min(numbers, default=0)
        and max(numbers, default=0) <= limit  # before isnan, which raises for an integer beyond floats
        and not any(map(math.isnan, numbers))
    )


def check_outline(who: str, outline: Any, height: int, width: int) -> None:
    """BadSample `mask_size` or `bad_mask` unless `outline` is polygons or RLE of an image of height x width."""
    match outline:
        case {"size": found, "counts": str() | list() as counts}:
            if found != [height, width] or set(map(type, found)) != {int}:
                raise BadSample(
                    "mask_size", f"{who} has a mask of {brief(found)}, its image has {[height, width]}"
                )
            _check_runs(who, counts, height * width)
        case [*polygons] if polygons and all(
            isinstance(p, list) and len(p) >= 6 and not len(p) % 2 for p in polygons
        ):
            _check_polygons(who, polygons, height, width)
        case _:
            raise BadSample(
                "bad_mask", f"{who} has segmentation {brief(outline)}: it must be polygons or RLE"
            )


def _check_polygons(who: str, polygons: list[list[Any]], height: int, width: int) -> None:
    """Raises BadSample where the decoder, which stores the edges in fifths of pixels, would not come to an end."""
    far = FAR * max(height, width)
    for polygon in polygons:
        if not are_real(polygon, far):
            raise BadSample(
                "bad_mask",
                f"{who} has polygon {brief(polygon)}, whose numbers must be real and within +-{far}",
            )
        longest = height * width + FAR * (height + width)  # pixels: every one passed once, and the way around
        if len(polygon) * far > longest and _length(polygon) > longest:
            raise BadSample(
                "bad_mask",
                f"{who} has polygon {brief(polygon)}, {_length(polygon):.0f} pixels long: at most {longest} "
                f"in an image of {height} x {width}",
            )


def _length(polygon: list[float]) -> float:
    """Pixels that its edges pass, each along its steeper direction."""
    corners = np.array(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(1).sum())


def _check_runs(who: str, counts: str | list[Any], pixels: int) -> None:
    """Raises BadSample unless the runs of an RLE are whole numbers that cover the image once; decodes no mask."""
    try:
        runs = runs_of(counts) if isinstance(counts, str) else counts
    except ValueError as error:
        raise BadSample("bad_mask", f"{who} has a broken RLE {brief(counts)}: {error}") from error
    if set(map(type, runs)) != {int} or min(runs) < 0 or sum(runs) != pixels:
        raise BadSample(
            "bad_mask", f"{who} has an RLE of {brief(counts)}, whose runs must sum to its {pixels} pixels"
        )


def runs_of(counts: str) -> list[int]:
    """The runs of a compressed RLE; ValueError where it is none.

    Characters hold five bits each, low ones first, the sixth says that more follow, the highest of a number is its
    sign; from the fourth run on, a number is the difference to the last but one. Source: pycocotools' maskApi.c.
    """
    code = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - ord("0")
    if not code.size:
        raise ValueError("it is empty")
    if code.min() < 0 or code.max() > 63 or code[-1] & 32:
        raise ValueError("it has other characters, or ends within a number")
    ends = np.flatnonzero(code & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > GROUPS:
        raise ValueError(f"a number has more than {GROUPS} characters")
    place = np.arange(len(code)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((code & 31) << 5 * place, starts)
    runs -= (code[ends] >> 4 & 1) << 5 * lengths
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs.tolist()
