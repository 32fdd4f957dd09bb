"""How large, how long and how small may an image be that shards hold, and what says that one is not usable?"""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.headers import MAX_PIXELS
from data_prep.pixels import size_for

USUAL_TILE = 2**22  # pixels; larger tiles are for pictures that fill at least a quarter of one


@dataclass(frozen=True)
class Limits:
    """Which images are good enough, and how large they are stored."""

    min_side: int = 32  # pixels of the shorter side
    # Width x height of an input: more is a decompression bomb (Pillow's own limit). What is stored, reduced or not,
    # has at most MAX_PIXELS whatever is said here, a WebP MAX_WEBP_PIXELS: training takes no more.
    max_pixels: int = 178_956_970
    max_bytes: int = 50 * 2**20  # of the file
    max_aspect: float = 20.0  # longer side over shorter side
    short_side: int = 0  # pixels; a longer short side is reduced to it, 0 never

    def __post_init__(self) -> None:
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect={self.max_aspect} is longer over shorter side: pass at least 1")
        if self.short_side and self.short_side < self.min_side:
            raise ValueError(
                f"short_side={self.short_side} is below min_side={self.min_side}: raise it, or pass 0 for no resize"
            )


class BadImage(Exception):
    """An input that is no usable image; `reason` is one word for the count."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        """A process may send it to others."""
        return type(self), (self.reason, self.detail)


def require_size(width: int, height: int, limits: Limits, max_stored: int = MAX_PIXELS) -> None:
    """BadImage for a picture of a size that is not stored; `max_stored` pixels has one that stays as it is."""
    if width * height > limits.max_pixels:
        raise BadImage("too_large", f"{width} x {height} pixels, at most {limits.max_pixels}")
    stored = size_for(width, height, limits.short_side)
    most = max_stored if stored == (width, height) else MAX_PIXELS  # what is reduced becomes a JPEG or PNG
    if stored[0] * stored[1] > most:
        raise BadImage(
            "too_large",
            f"{stored[0]} x {stored[1]} pixels to store, training takes at most {most}: reduce it, as `build folder "
            "--short-side` does",
        )
    if min(width, height) < limits.min_side:
        raise BadImage("too_small", f"{width} x {height} pixels, shorter side at least {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise BadImage(
            "too_long", f"{width} x {height} pixels, longer over shorter side at most {limits.max_aspect:g}"
        )


def require_tile(width: int, height: int, size: tuple[int, int], limits: Limits) -> None:
    """BadImage for large tiles: one is decoded whole, however little of it the picture shows."""
    most = min(max(USUAL_TILE, 4 * size[0] * size[1]), limits.max_pixels)
    if width * height > most:
        raise BadImage("too_large", f"tiles of {width} x {height} pixels, at most {most} for this picture")
