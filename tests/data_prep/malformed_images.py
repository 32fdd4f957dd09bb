"""Which images do people have, sound, odd, broken or hostile, and what becomes of each? A table that a test reads.

A case is a name, the bytes, and a verdict: "kept" (stored bit for bit), "changed: WHY" (stored again as plain
pixels), or "refused: REASON".
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

WIDTH, HEIGHT = 96, 64


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], bytes]
    verdict: str


def picture(mode: str = "RGB", width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    """Smooth random colours; RGBA and LA are transparent in places."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 4), dtype=np.uint8), "RGBA")
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(form: str, mode: str | Image.Image = "RGB", **options: object) -> bytes:
    """A picture as a file of that format."""
    buffer = io.BytesIO()
    (picture(mode) if isinstance(mode, str) else mode).save(buffer, form, **options)
    return buffer.getvalue()


def _turned(form: str, orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(form, exif=exif, **options)


def _moving(form: str) -> bytes:
    return encoded(form, save_all=True, append_images=[picture(seed=1), picture(seed=2)], duration=20)


def _deep(channels: int) -> bytes:
    """A PNG of 16 bits a channel, written by hand: Pillow writes grey ones only."""
    values = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return _png(WIDTH, HEIGHT, 16, kind, zlib.compress(rows))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, depth: int, kind: int, data: bytes, *more: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _deep_tiff() -> bytes:
    return encoded("TIFF", Image.fromarray(np.full((64, 96), 128 * 257, np.uint16)))


def _unpacking(kind: bytes) -> bytes:
    """A PNG with 50 MB of nothing in a chunk beside the pixels."""
    return _png(96, 64, 8, 2, b"", _chunk(kind, b"a\0\0" + zlib.compress(bytes(50_000_000))))


def _jpeg(**options: object) -> bytes:
    return encoded("JPEG", **options)


def _spoiled(content: bytes, position: float, new: bytes) -> bytes:
    """The bytes with some of them replaced, at a fraction of the length."""
    start = round(len(content) * position)
    return content[:start] + new + content[start + len(new) :]


def _after(content: bytes, name: bytes, new: bytes) -> bytes:
    """The bytes with those that follow a name replaced."""
    return _spoiled(content, (content.index(name) + len(name)) / len(content), new)


def _sized_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose frame header tells another size."""
    content = _jpeg()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def _without_segment(content: bytes, marker: bytes) -> bytes:
    start = content.index(marker)
    return content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4], "big") :]


def _many_scans() -> bytes:
    """A progressive JPEG with the last scan repeated 200 times, each of which costs a pass over the picture."""
    content = _jpeg(progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * 200 + content[-2:]


def _arithmetic(frame: int, scans: int) -> bytes:
    """A grey JPEG of 8000 x 8000 pixels in arithmetic codes with many empty scans, a few bytes each."""
    segments = [
        (0xDB, b"\0" + b"\1" * 64),
        (frame, struct.pack(">BHHB", 8, 8000, 8000, 1) + b"\1\x11\0"),
        (0xDA, b"\1\1\0" + bytes([0, 0, 0])),
        *[(0xDA, b"\1\1\0" + bytes([1, 63, 0]))] * scans,
    ]
    body = b"".join(
        b"\xff" + bytes([code]) + struct.pack(">H", len(text) + 2) + text for code, text in segments
    )
    return b"\xff\xd8" + body + b"\xff\xd9"


def _sequential_scans() -> bytes:
    """A sequential JPEG with its only scan 200 times."""
    content = encoded("JPEG", "L")
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * 200 + content[-2:]


_LOSSY = b"\x10\x00\x00\x9d\x01\x2a"  # a key frame of VP8; width and height follow


def _webp_header(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk + bytes(64)


def _avif_of(width: int, height: int) -> bytes:
    """An AVIF file whose header tells another size."""
    content = encoded("AVIF")
    at = content.index(b"ispe") + 8
    return content[:at] + struct.pack(">II", width, height) + content[at + 8 :]


def _gif_of(width: int, height: int) -> bytes:
    content = encoded("GIF", "P")
    return content[:6] + struct.pack("<HH", width, height) + content[10:]


def _bmp_of(width: int, height: int) -> bytes:
    content = encoded("BMP")
    return content[:18] + struct.pack("<ii", width, height) + content[26:]


def _tiff_of(width: int, height: int) -> bytes:
    """Only a header: little-endian, one strip that is not there."""
    return _tiff({256: width, 257: height, 258: 8, 262: 1, 273: 8, 279: 9}.items())


def _tiff(tags: Iterable[tuple[int, int]], data: bytes = b"") -> bytes:
    """A TIFF by hand, little-endian: data from byte 8 on, and numbers of 32 bits."""
    tags = list(tags)
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + len(data)
    return b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(tags)) + body + bytes(4)


def _tiled(*sides: tuple[int, int]) -> bytes:
    """A grey TIFF of 96 x 64 pixels in one tile of nothing whose sides may be told twice, the last ones true."""
    data = zlib.compress(bytes(min(sides[-1][0] * sides[-1][1], 10**8)))
    pixels = [(256, 96), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1)]
    tiles = [(322, width) for width, _ in sides] + [(323, height) for _, height in sides]
    return _tiff([*pixels, *tiles, (324, 8), (325, len(data))], data)


def _big_tiff_tiled(width: int, height: int) -> bytes:
    """The same, only its header, as a BigTIFF."""
    tags = {256: 96, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 8, 325: 9}
    body = b"".join(struct.pack("<HHQQ", tag, 16, 1, value) for tag, value in tags.items())
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, len(tags)) + body + bytes(8)


def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def _text(size: int) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * size, zip=True)
    return info


def _keyed() -> bytes:
    """A PNG with one colour made transparent."""
    image = picture("P").convert("RGB")
    return encoded("PNG", image, transparency=image.getpixel((10, 10)))


def _keyed_in_bits(depth: int, channels: int = 1) -> bytes:
    """A PNG of so many bits a channel, of which the colour of the pixel on top left is transparent."""
    values = np.random.default_rng(0).integers(0, 2**depth, (HEIGHT, WIDTH, channels)).astype(">u2")
    bits = np.unpackbits(values.view(np.uint8).reshape(HEIGHT, -1, 2), axis=2)[..., 16 - depth :]
    packed = np.packbits(bits.reshape(HEIGHT, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    key = _chunk(b"tRNS", values[0, 0].tobytes())
    return _png(WIDTH, HEIGHT, depth, {1: 0, 3: 2}[channels], zlib.compress(rows), key)


def _keyed_behind_a_comment() -> bytes:
    """A PNG of 8 bits with a chunk before its header, which must be the first: Pillow reads it all the same."""
    content = _keyed_in_bits(8)
    return content[:8] + _chunk(b"tEXt", b"a\0" + bytes(20)) + content[8:]


def _palette_with_holes() -> bytes:
    return encoded("PNG", picture("P"), transparency=bytes([0, 128] + [255] * 254))


KEPT = [
    ("jpeg", _jpeg),
    ("jpeg_grey", lambda: encoded("JPEG", "L")),
    ("jpeg_progressive", lambda: _jpeg(progressive=True)),
    ("jpeg_444", lambda: _jpeg(subsampling="4:4:4")),
    ("jpeg_422", lambda: _jpeg(subsampling="4:2:2")),
    ("jpeg_rgb_colours", lambda: _jpeg(keep_rgb=True)),
    ("jpeg_restart_markers", lambda: _jpeg(restart_marker_rows=1)),
    ("jpeg_quality_1", lambda: _jpeg(quality=1)),
    ("jpeg_comment", lambda: _jpeg(comment=b"made \xff by nobody")),
    ("jpeg_without_its_standard_codes", lambda: _without_segment(_jpeg(), b"\xff\xc4")),  # as films have them
    ("jpeg_exif_upright", lambda: _turned("JPEG", 1)),
    ("jpeg_exif_orientation_0", lambda: _turned("JPEG", 0)),
    ("jpeg_exif_orientation_99", lambda: _turned("JPEG", 99)),
    ("jpeg_exif_is_noise", lambda: _jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff noise")),
    ("jpeg_xmp", lambda: _jpeg(xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")),
    ("jpeg_foreign_profile", lambda: _jpeg(icc_profile=_profile())),
    ("jpeg_rest_after_its_end", lambda: _jpeg() + b"and then a video " * 99),
    ("jpeg_film_after_its_end", lambda: _jpeg(progressive=True) + b"\xff\xda in a film " * 500),
    ("jpeg_of_two_views", lambda: encoded("MPO", save_all=True, append_images=[picture(seed=1)])),
    ("png", lambda: encoded("PNG")),
    ("png_grey", lambda: encoded("PNG", "L")),
    ("png_1_bit", lambda: encoded("PNG", "1")),
    ("png_palette", lambda: encoded("PNG", picture().convert("P"))),
    ("png_opaque_alpha", lambda: encoded("PNG", picture("RGB").convert("RGBA"))),
    ("png_text", lambda: encoded("PNG", pnginfo=_text(1000))),
    ("png_foreign_profile", lambda: encoded("PNG", icc_profile=_profile())),
    ("webp", lambda: encoded("WEBP")),
    ("webp_lossless", lambda: encoded("WEBP", lossless=True)),
    ("webp_profile", lambda: encoded("WEBP", icc_profile=_profile())),
    ("smallest_side", lambda: encoded("PNG", picture(width=32, height=32))),
    ("longest_side", lambda: encoded("PNG", picture(width=640, height=32))),
]

CHANGED = [
    *((f"jpeg_turned_{turn}", lambda turn=turn: _turned("JPEG", turn), "turned") for turn in range(2, 9)),
    ("jpeg_grey_turned", lambda: _turned("JPEG", 6, mode="L"), "turned"),
    ("png_turned", lambda: _turned("PNG", 6), "turned"),
    ("webp_turned", lambda: _turned("WEBP", 8), "turned"),
    ("jpeg_cmyk", lambda: encoded("JPEG", "CMYK"), "mode_CMYK"),
    ("jpeg_cmyk_profile", lambda: encoded("JPEG", "CMYK", icc_profile=_profile()), "mode_CMYK"),
    ("tiff_cmyk", lambda: encoded("TIFF", "CMYK"), "format_TIFF+mode_CMYK"),
    ("png_16_bit_grey", lambda: _deep(1), "mode_I_16"),
    ("png_16_bit_grey_alpha", lambda: _deep(2), "mode_RGBA_16+alpha"),
    ("png_16_bit_rgb", lambda: _deep(3), "mode_RGB_16"),
    ("png_16_bit_rgba", lambda: _deep(4), "mode_RGBA_16+alpha"),
    ("tiff_16_bit", _deep_tiff, "format_TIFF+mode_I_16"),
    ("png_alpha", lambda: encoded("PNG", "RGBA"), "alpha"),
    ("png_grey_alpha", lambda: encoded("PNG", "LA"), "alpha"),
    ("png_transparent_colour", _keyed, "alpha"),
    ("png_transparent_grey_of_2_bits", lambda: _keyed_in_bits(2), "alpha"),
    ("png_transparent_grey_of_4_bits", lambda: _keyed_in_bits(4), "alpha"),
    ("png_transparent_grey_of_16_bits", lambda: _keyed_in_bits(16), "mode_I_16+alpha"),
    ("png_transparent_grey_behind_a_comment", _keyed_behind_a_comment, "alpha"),
    ("png_transparent_colour_of_16_bits", lambda: _keyed_in_bits(16, 3), "mode_RGB_16+alpha"),
    ("png_transparent_palette", _palette_with_holes, "alpha"),
    ("webp_alpha", lambda: encoded("WEBP", "RGBA"), "alpha"),
    ("gif", lambda: encoded("GIF"), "format_GIF"),
    ("gif_moving", lambda: _moving("GIF"), "format_GIF+first_frame"),
    ("gif_transparent", lambda: encoded("GIF", picture("P"), transparency=0), "format_GIF+alpha"),
    ("png_moving", lambda: _moving("PNG"), "first_frame"),
    ("webp_moving", lambda: _moving("WEBP"), "first_frame"),
    ("tiff", lambda: encoded("TIFF"), "format_TIFF"),
    ("tiff_lzw", lambda: encoded("TIFF", compression="tiff_lzw"), "format_TIFF"),
    ("tiff_jpeg", lambda: encoded("TIFF", compression="jpeg"), "format_TIFF"),
    ("tiff_pages", lambda: _moving("TIFF"), "format_TIFF+first_frame"),
    ("tiff_of_a_tile", lambda: _tiled((96, 64)), "format_TIFF"),
    ("tiff_of_a_larger_tile", lambda: _tiled((1024, 1024)), "format_TIFF"),
    ("tiff_turned", lambda: encoded("TIFF", tiffinfo={274: 6}), "format_TIFF"),
    ("bmp", lambda: encoded("BMP"), "format_BMP"),
    ("bmp_palette", lambda: encoded("BMP", "P"), "format_BMP"),
    ("bmp_1_bit", lambda: encoded("BMP", "1"), "format_BMP"),
    ("avif", lambda: encoded("AVIF"), "format_AVIF"),
    ("avif_alpha", lambda: encoded("AVIF", "RGBA"), "format_AVIF+alpha"),
    ("avif_moving", lambda: _moving("AVIF"), "format_AVIF+first_frame"),
]  # fmt: skip

TOO_LARGE = [  # for training, and well below what is a bomb
    ("png", lambda: _png(8193, 8193, 8, 2, b"")),
    ("jpeg", lambda: _sized_jpeg(8193, 8193)),
    ("webp", lambda: _webp_header(b"VP8X", bytes(4) + b"\x70\x17\x00" * 2)),
]

BOMBS = [  # all told from the header
    ("bomb_png", lambda: _png(60_000, 60_000, 8, 2, b""), "too_large"),
    ("bomb_png_that_unpacks", lambda: _png(20_000, 20_000, 1, 0, zlib.compress(bytes(2501 * 20_000))), "too_large"),
    ("bomb_jpeg", lambda: _sized_jpeg(65_500, 65_500), "too_large"),
    ("bomb_webp", lambda: _webp_header(b"VP8X", bytes(4) + b"\xfe\x3f\x00" * 2), "too_large"),
    ("bomb_webp_lossless", lambda: _webp_header(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(30)), "too_large"),
    ("bomb_webp_lossy", lambda: _webp_header(b"VP8 ", _LOSSY + b"\xff\x3f\xff\x3f" + bytes(20)), "too_large"),
    ("bomb_gif", lambda: _gif_of(65_535, 65_535), "too_large"),
    ("bomb_bmp", lambda: _bmp_of(60_000, 60_000), "too_large"),
    ("bomb_tiff", lambda: _tiff_of(100_000, 100_000), "too_large"),
    ("bomb_of_a_tile", lambda: _tiled((30_000, 16_384)), "too_large"),
    ("bomb_of_a_tile_told_twice", lambda: _tiled((30_000, 16_384), (96, 64)), "too_large"),
    ("bomb_of_a_tile_in_a_big_tiff", lambda: _big_tiff_tiled(30_000, 16_384), "too_large"),
    ("bomb_of_a_tile_that_is_just_large", lambda: _tiled((4096, 4096)), "too_large"),
    ("bomb_avif", lambda: _avif_of(16_000, 16_000), "too_large"),
    ("bomb_of_text", lambda: _unpacking(b"zTXt"), "corrupt"),
    ("bomb_of_profile", lambda: _unpacking(b"iCCP"), "corrupt"),
    ("bomb_of_scans", _many_scans, "too_many_scans"),
    ("bomb_of_scans_one_after_another", _sequential_scans, "too_many_scans"),
    ("bomb_of_scans_in_arithmetic_codes", lambda: _arithmetic(0xCA, 1500), "unsupported_coding"),
    *[(f"larger_than_training_takes_{name}", make, "too_large") for name, make in TOO_LARGE],
    ("strip", lambda: _png(1, 3000, 8, 0, b""), "too_small"),
    ("ribbon", lambda: _png(32, 3000, 8, 0, b""), "too_long"),
    ("ribbon_jpeg", lambda: _sized_jpeg(40, 60_000), "too_long"),
]  # fmt: skip

REFUSED = [
    ("empty", lambda: b"", "empty"),
    ("one_byte", lambda: b"\xff", "not_an_image"),
    ("text", lambda: b"this is no image at all", "not_an_image"),
    ("html", lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not_an_image"),
    ("svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='99' height='99'/>", "not_an_image"),
    ("json", lambda: b'{"error": "gone"}', "not_an_image"),
    ("zip", lambda: b"PK\x03\x04" + bytes(100), "not_an_image"),
    ("pdf", lambda: b"%PDF-1.7\n" + bytes(100), "not_an_image"),
    ("postscript", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "not_an_image"),
    ("video", lambda: b"\0\0\0\x18ftypmp42" + bytes(100), "not_an_image"),
    ("ppm", lambda: encoded("PPM"), "not_an_image"),
    ("icon", lambda: encoded("ICO"), "not_an_image"),
    ("jpeg_2000", lambda: encoded("JPEG2000"), "not_an_image"),
    ("zeros", lambda: bytes(5000), "not_an_image"),
    ("pixel", lambda: encoded("GIF", picture("L", 1, 1)), "too_small"),
    ("small", lambda: encoded("JPEG", picture(width=200, height=31)), "too_small"),
    ("jpeg_first_half", lambda: _jpeg()[: len(_jpeg()) // 2], "truncated"),
    ("jpeg_all_but_a_little", lambda: _jpeg()[: int(len(_jpeg()) * 0.95)], "truncated"),
    ("jpeg_without_its_end", lambda: _jpeg()[:-2], "truncated"),
    ("jpeg_first_bytes", lambda: _jpeg()[:30], "corrupt"),
    ("jpeg_progressive_first_half", lambda: _jpeg(progressive=True)[:1500], "truncated"),
    ("jpeg_cmyk_first_half", lambda: encoded("JPEG", "CMYK")[:2000], "truncated"),
    ("jpeg_markers_in_the_middle", lambda: _spoiled(_jpeg(), 0.7, b"\xff\xd0\xff\xd3\xff\xd5\xff\xd1"), "truncated"),
    ("jpeg_ones_in_the_middle", lambda: _spoiled(_jpeg(), 0.6, b"\xff\x00" * 150), "corrupt"),
    ("jpeg_without_tables", lambda: _without_segment(_jpeg(), b"\xff\xdb"), "corrupt"),
    ("jpeg_of_12_bits", lambda: _jpeg().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "corrupt"),
    ("jpeg_in_arithmetic_codes", lambda: _arithmetic(0xC9, 0), "unsupported_coding"),
    ("jpeg_in_lossless_arithmetic_codes", lambda: _arithmetic(0xCB, 0), "unsupported_coding"),
    ("jpeg_of_no_height", lambda: _sized_jpeg(96, 0), "not_an_image"),
    ("jpeg_taller_than_told", lambda: _sized_jpeg(96, 640), "truncated"),
    ("png_first_half", lambda: encoded("PNG")[: len(encoded("PNG")) // 2], "truncated"),
    ("png_flipped_bit", lambda: _spoiled(encoded("PNG"), 0.5, b"\xaa"), "corrupt"),
    ("png_header_changed", lambda: _spoiled(encoded("PNG"), 17 / len(encoded("PNG")), b"\x01"), "not_an_image"),
    ("png_without_pixels", lambda: _png(96, 64, 8, 2, b""), "truncated"),
    ("png_too_few_pixels", lambda: _png(96, 64, 8, 2, zlib.compress(bytes(1000))), "truncated"),
    ("png_palette_missing", lambda: _png(96, 64, 8, 3, zlib.compress(bytes(97 * 64))), "corrupt"),
    ("png_of_no_width", lambda: _png(0, 64, 8, 2, b""), "not_an_image"),
    ("png_unknown_filter", lambda: _png(96, 64, 8, 0, zlib.compress((b"\x09" + bytes(96)) * 64)), "corrupt"),
    ("webp_first_half", lambda: encoded("WEBP")[: len(encoded("WEBP")) // 2], "corrupt"),
    ("webp_noise", lambda: _webp_header(b"VP8 ", _LOSSY + b"\x60\x00\x40\x00" + bytes(20)), "corrupt"),
    ("gif_first_half", lambda: encoded("GIF")[: len(encoded("GIF")) // 2], "truncated"),
    ("bmp_first_half", lambda: encoded("BMP")[:9000], "truncated"),
    ("tiff_first_half", lambda: encoded("TIFF")[:9000], "truncated"),
    ("tiff_of_nothing", lambda: _tiff_of(96, 64), "truncated"),
    ("avif_first_half", lambda: encoded("AVIF")[: len(encoded("AVIF")) // 2], "not_an_image"),
    ("avif_without_its_pixels", lambda: _after(encoded("AVIF"), b"mdat", bytes(400)), "corrupt"),
    ("avif_without_its_picture", lambda: _after(encoded("AVIF"), b"pitm", bytes([0, 0, 0, 0, 0, 99])), "corrupt"),
    ("tiff_of_32_bit_numbers", lambda: encoded("TIFF", picture("L").convert("I")), "unsupported_colour"),
    ("tiff_of_fractions", lambda: encoded("TIFF", picture("L").convert("F")), "unsupported_colour"),
    ("tiff_of_lab", lambda: encoded("TIFF", Image.new("LAB", (96, 64))), "unsupported_colour"),
    ("file_too_large", lambda: _jpeg() + bytes(51 * 2**20), "too_large"),
]  # fmt: skip

TABLE = [
    *(Case(name, make, "kept") for name, make in KEPT),
    *(Case(name, make, f"changed: {why}") for name, make, why in CHANGED),
    *(Case(name, make, f"refused: {reason}") for name, make, reason in [*BOMBS, *REFUSED]),
]
