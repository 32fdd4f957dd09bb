"""What does a file tell of its picture before a decoder sees it? Sizes and numbers that decide what decoding costs.

Read here from the bytes themselves, since the decoders take memory or time for what they are about to find out.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAX_PIXELS = 64 * 2**20  # of an image in a shard: training refuses a larger one before it takes memory for it
MAX_WEBP_PIXELS = 32 * 2**20  # Pillow's reader of WebP holds four pictures of four bytes a pixel
ARITHMETIC = (0xC9, 0xCA, 0xCB)  # frames of a JPEG: sequential, progressive, lossless
SEQUENTIAL = (0xC0, 0xC1)  # frames of a JPEG in Huffman codes
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
ALONE = (0x01, 0xD8, *range(0xD0, 0xD8))  # markers of a JPEG that no segment follows
FRAMES = tuple(code for code in range(0xC0, 0xD0) if code not in (0xC4, 0xC8, 0xCC))
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of a TIFF
_WHOLE_NUMBERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8, 18: 8}  # type in a TIFF -> bytes
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)


@dataclass(frozen=True)
class JpegHead:
    """What stands before the first scan of a JPEG."""

    num_bytes: int  # up to that scan, or to the end where there is none
    frame: (
        int | None
    )  # how it is coded: the last byte of its first marker SOF, 0xC0 to 0xCF; None without one
    is_one_pass: (
        bool  # sequential, all colours in the first scan: libjpeg decodes that one and refuses a second
    )


def jpeg_head(content: bytes) -> JpegHead:
    """The head of a JPEG, found by its markers."""
    frame, num_components = None, None
    for code, position in _jpeg_markers(content):
        if code in FRAMES and frame is None:
            frame, num_components = code, content[position + 7 : position + 8]
        if code == START_OF_SCAN:
            is_one_pass = frame in SEQUENTIAL and content[position + 2 : position + 3] == num_components
            return JpegHead(position, frame, is_one_pass)
    return JpegHead(len(content), frame, False)


def num_scans(content: bytes, enough: int) -> int:
    """Passes over the picture that a JPEG asks for; counted up to `enough` or a few more."""
    scan = bytes((0xFF, START_OF_SCAN))
    if (most := content.count(scan)) <= enough:  # also in thumbnails, and what follows the picture
        return most
    found = 0
    for code, _ in _jpeg_markers(content):
        found += code == START_OF_SCAN
        if found > enough:
            break
    return found


def _jpeg_markers(content: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a JPEG up to its end, and where each ends; found as libjpeg does, which passes over the rest."""
    position = 2
    while (match := _MARKER.search(content, position)) is not None:
        code, position = match[1][0], match.end()
        yield code, position
        if code == END_OF_IMAGE:
            return
        if code not in ALONE:
            position += max(2, int.from_bytes(content[position : position + 2], "big"))


def webp_size(content: bytes) -> tuple[int, int] | None:
    """Width and height in pixels that the header of a WebP file tells; None for anything else."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return None
    kind, body = content[12:16], content[20:30]
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def tiff_tile(content: bytes) -> tuple[int, int]:
    """Width and height in pixels of the tiles of a TIFF's first picture, (0, 0) where it has none.

    The largest of each where a tag stands twice: readers differ in which one they take. Rows of a strip are not
    asked for: libtiff reads no more of them than the picture has.
    """
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None:
        return 0, 0
    is_big = content[2:4] in (b"+\0", b"\0+")  # BigTIFF: everything takes 8 bytes
    start, count, entry, inline = ("Q", "Q", "HHQ", 8) if is_big else ("I", "H", "HHI", 4)
    sides = {TILE_WIDTH: 0, TILE_LENGTH: 0}
    try:
        (position,) = struct.unpack_from(order + start, content, 8 if is_big else 4)
        (num_entries,) = struct.unpack_from(order + count, content, position)
        position += struct.calcsize(order + count)
        for at in range(
            position, min(position + num_entries * (12 + 8 * is_big), len(content)), 12 + 8 * is_big
        ):
            tag, kind, _ = struct.unpack_from(order + entry, content, at)
            if tag in sides and kind in _WHOLE_NUMBERS:
                num_bytes, value = _WHOLE_NUMBERS[kind], at + struct.calcsize(order + entry)
                if num_bytes > inline:
                    (value,) = struct.unpack_from(order + start, content, value)
                number = content[value : value + num_bytes]
                sides[tag] = max(sides[tag], int.from_bytes(number, "little" if order == "<" else "big"))
    except struct.error:  # cut: the decoder says so
        pass
    return sides[TILE_WIDTH], sides[TILE_LENGTH]
