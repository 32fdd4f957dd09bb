"""How alike do two pictures look? 64-bit perceptual hashes, those of the records, and of altered copies.

A hash says which of the 64 lowest frequencies of a picture at 32 x 32 grey pixels exceed their median, so that 32 of
its bits are ones for any picture with texture, and distances are even. Records hold it as 16 hexadecimal digits.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_prep.images import Checked, check_image
from data_prep.limits import Limits
from data_prep.pixels import grey, perceptual_hash, plain, with_key

TEXTURED = 16  # ones at least; below that a picture is flat and its hash says nothing
SAME_PICTURE = 4  # bits that two versions of a decoder may differ in
CROPS = (0.025, 0.05)  # fractions of each side that an altered copy may lack
SIDE_CROP = 0.04  # fraction of one side that an altered copy may lack
ANY = Limits(
    min_side=1, max_pixels=2**40, max_bytes=2**40, max_aspect=2.0**20
)  # what is stored was judged before
_HEX = re.compile(r"[0-9a-f]{16}")


def stored_image(content: bytes) -> Checked:
    """An image of a shard, decoded as strictly as when it was built, with its hash; raises BadImage."""
    return check_image(content, ANY)


def recorded_hash(record: dict[str, Any]) -> int | None:
    """The hash that a sample's record holds, None without one; ValueError when it is none."""
    text = record.get("phash")
    if text is None:
        return None
    if not isinstance(text, str) or not _HEX.fullmatch(text):
        raise ValueError(f"phash={text!r} must be 16 lower-case hexadecimal digits")
    return int(text, 16)


def is_textured(values: np.ndarray) -> np.ndarray:
    """Which uint64 hashes tell pictures apart; those of flat ones are all alike."""
    return np.bitwise_count(values) >= TEXTURED


def grey_of(content: bytes) -> UInt8[np.ndarray, "h w"]:
    """An encoded picture in grey, a JPEG not larger than hashes need; one of images.DAMAGED for none."""
    image = with_key(Image.open(io.BytesIO(content)), content)
    image.draft("L", (256, 256))  # of a JPEG: a quarter of the pixels is enough, and faster
    image.load()
    return grey(plain(image))


def views_of(pixels: UInt8[np.ndarray, "h w"]) -> list[int]:
    """Hashes of a picture and of what it becomes by a cut border or a mirror, the picture's own first.

    A copy that lacks up to about 5 % at all sides, or 4 % at one, is then as near to one of them as a copy encoded
    again is to the picture.
    """
    sides = [tuple(SIDE_CROP * (side == cut) for cut in range(4)) for side in range(4)]
    parts = whole_cuts(pixels) + [_cut(pixels, *box) for box in sides]
    return [hash_of(view) for part in parts for view in (part, part[:, ::-1])]


def whole_cuts(pixels: UInt8[np.ndarray, "h w"]) -> list[UInt8[np.ndarray, "_ _"]]:
    """A picture, and what is left of it by cuts at all sides."""
    return [_cut(pixels, *(4 * (cut,))) for cut in (0.0, *CROPS)]


def _cut(
    pixels: UInt8[np.ndarray, "h w"], left: float, top: float, right: float, bottom: float
) -> UInt8[np.ndarray, "_ _"]:
    height, width = pixels.shape
    return pixels[
        round(top * height) : round((1 - bottom) * height),
        round(left * width) : round((1 - right) * width),
    ]


def hash_of(pixels: UInt8[np.ndarray, "h w"]) -> int:
    """The hash of a picture in grey, as a number."""
    return int(perceptual_hash(np.ascontiguousarray(pixels)), 16)
