"""Is this an image that training can trust, and what of it is stored? A strict full decode; the original if possible.

JPEG is decoded by libjpeg-turbo with warnings as errors, since Pillow accepts damage in the middle of a stream;
PNG by Pillow with every checksum verified; WebP and the rest by Pillow (lossy WebP has no checksum: only what breaks
decoding shows). Whatever the header tells is judged before a pixel is decoded.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import simplejpeg
from PIL import Image

from data_prep.headers import (
    ARITHMETIC,
    MAX_WEBP_PIXELS,
    JpegHead,
    jpeg_head,
    num_scans,
    tiff_tile,
    webp_size,
)
from data_prep.limits import BadImage, Limits, require_size, require_tile
from data_prep.pixels import (
    HASH_SIDE,
    Pixels,
    as_jpeg,
    as_png,
    grey,
    is_transparent,
    orientation_of,
    perceptual_hash,
    plain,
    size_for,
    smaller,
    turned,
    with_key,
)

KEPT = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # Pillow's format -> extension; may stay as is
CONVERTED = {
    "GIF": "png",
    "BMP": "png",
    "DIB": "png",
    "TIFF": "png",
    "AVIF": "jpg",
}  # -> what it is stored as
PLAIN = ("YCbCr", "Gray", "RGB")  # colours of a JPEG that everybody reads alike, as libjpeg-turbo calls them
MAX_SCANS = 100  # of a JPEG: usual are 1, progressive 10, and each costs a pass over the picture
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    RuntimeError,  # of AVIF
    struct.error,
    Image.DecompressionBombError,
)  # says Pillow


@dataclass(frozen=True)
class Checked:
    """A good image: bytes to store, their extension and size, and why they differ from the input ("" = not)."""

    content: bytes
    extension: str
    size: tuple[int, int]  # width, height in pixels
    changed: str  # such as "turned+resized"
    phash: str  # perceptual hash of the picture, 16 hexadecimal digits


def check_image(content: bytes, limits: Limits) -> Checked:
    """The image in `content`, fully decoded once; raises BadImage with one of the reasons in the code below.

    Bytes that need nothing are stored as they are. Encoded again, as JPEG where they came from a lossy format, else
    as PNG, are images that are turned (EXIF), larger than `limits.short_side`, partly transparent (put on white), of
    16 bits, of CMYK, animated (first frame), or of a format that few read: GIF, BMP, TIFF, AVIF.
    """
    if not content:
        raise BadImage("empty", "0 bytes")
    if len(content) > limits.max_bytes:
        raise BadImage("too_large", f"{len(content)} bytes, at most {limits.max_bytes}")
    try:
        return _judged(content, limits)
    except (BadImage, MemoryError):  # too little memory is no fault of the file
        raise
    except (
        Exception
    ) as error:  # what decoders raise is not listed anywhere, and one file must not end a build
        raise BadImage("corrupt", f"unexpected {type(error).__name__}: {error}") from error


def _judged(content: bytes, limits: Limits) -> Checked:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is checked here
        if (size := webp_size(content)) is not None:  # Pillow's reader takes memory for it when it opens
            require_size(*size, limits, MAX_WEBP_PIXELS)
        head = jpeg_head(content) if content[:2] == b"\xff\xd8" else None
        if head is not None and (jpeg := _plain_jpeg(content, head)) is not None:
            require_size(*jpeg.size, limits)
            return _jpeg(content, head, jpeg, limits)
        image = _opened(content)
        require_size(*image.size, limits)
        if image.format in ("JPEG", "MPO"):
            return _jpeg(content, jpeg_head(content), _jpeg_of(image), limits)
        if image.format == "TIFF":
            require_tile(*tiff_tile(content), image.size, limits)
        return _other(content, image, limits)


def _opened(content: bytes) -> Image.Image:
    try:
        formats = [name for name in (*KEPT, *CONVERTED) if name != "MPO"]
        return with_key(Image.open(io.BytesIO(content), formats=formats), content)
    except Image.DecompressionBombError as error:
        raise BadImage("too_large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise BadImage("not_an_image", f"neither of {', '.join([*KEPT, *CONVERTED])}") from error
    except DAMAGED as error:
        raise BadImage("corrupt", str(error)) from error


@dataclass(frozen=True)
class _Jpeg:
    """What the header of a JPEG tells."""

    size: tuple[int, int]  # width, height in pixels
    mode: str  # L, RGB or CMYK
    orientation: int  # by EXIF, 1 to 8


def _plain_jpeg(content: bytes, head: JpegHead) -> _Jpeg | None:
    """The header of a JPEG with no metadata that could turn it; None for all else, which is left to Pillow.

    Pillow takes a tenth of the time that a photograph needs in all.
    """
    told = content[: head.num_bytes]
    if b"Exif\0\0" in told or b"ns.adobe.com/xap" in told:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if space not in PLAIN:
        return None
    return _Jpeg((width, height), "L" if space == "Gray" else "RGB", 1)


def _jpeg_of(image: Image.Image) -> _Jpeg:
    return _Jpeg(image.size, image.mode, orientation_of(image))


def _jpeg(content: bytes, head: JpegHead, header: _Jpeg, limits: Limits) -> Checked:
    """A JPEG, decoded once; only its luma, and at reduced size, where the bytes stay as they are."""
    if head.frame in ARITHMETIC:
        raise BadImage("unsupported_coding", "arithmetic codes, which browsers and most programs cannot read")
    if not head.is_one_pass:
        _require_few_scans(content)
    needed = [f"mode_{header.mode}"] if header.mode not in ("L", "RGB") else []
    changes = _changes(header.size, header.orientation, limits, needed)
    try:
        height, width, _, subsampling = simplejpeg.decode_jpeg_header(content)
        if (width, height) != header.size:
            raise ValueError(
                f"{width} x {height} and {header.size[0]} x {header.size[1]} pixels in one header"
            )
        if not changes:
            return Checked(content, "jpg", header.size, "", _jpeg_hash(content))
        pixels = _jpeg_pixels(content, header, limits)
    except DAMAGED as error:
        _require_few_scans(content)  # counting them takes longer than all else here, and these cost nothing
        raise _damaged(error) from error
    return _encoded(pixels, "jpg", limits, changes, "420" if subsampling == "420" else "444")


def _require_few_scans(content: bytes) -> None:
    if num_scans(content, MAX_SCANS) > MAX_SCANS:
        raise BadImage("too_many_scans", f"more than {MAX_SCANS} scans")


def _jpeg_pixels(content: bytes, header: _Jpeg, limits: Limits) -> Pixels:
    """Upright pixels of a JPEG; much larger ones than needed come at a half, a quarter or an eighth."""
    if header.mode == "CMYK":
        simplejpeg.decode_jpeg(content, "CMYK")  # Pillow, which knows about inverted ones, is not strict
        return plain(_opened(content))
    least, factor = (0, 1) if min(header.size) < 4 * limits.short_side else (2 * limits.short_side, 2)
    space = "GRAY" if header.mode == "L" else "RGB"
    pixels = simplejpeg.decode_jpeg(content, space, min_height=least, min_width=least, min_factor=factor)
    pixels = pixels[..., 0] if space == "GRAY" else pixels
    return turned(pixels, header.orientation)


def _other(content: bytes, image: Image.Image, limits: Limits) -> Checked:
    """Anything but a JPEG, decoded by Pillow."""
    form = image.format or ""
    needed = [] if form in KEPT else [f"format_{form}"]
    depth = _depth(content, image)
    if depth != 8 or image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        needed.append(
            f"mode_{image.mode}".replace(";", "_") + ("_16" if depth == 16 and ";" not in image.mode else "")
        )
    try:
        if form == "PNG":
            if content[25] == 3 and b"PLTE" not in content:  # Pillow makes one up
                raise ValueError("a palette is promised and missing")
            Image.open(io.BytesIO(content), formats=["PNG"]).verify()  # every checksum
        is_moving = getattr(image, "is_animated", False)
        image.seek(0)
        image.load()
        changes = _changes(
            image.size,
            orientation_of(image),
            limits,
            needed + ["first_frame"] * is_moving + ["alpha"] * is_transparent(image),
        )
    except DAMAGED as error:
        raise _damaged(error) from error
    try:
        pixels = plain(image)
    except ValueError as error:
        raise BadImage("unsupported_colour", str(error)) from error
    if not changes:
        return Checked(content, KEPT[form], image.size, "", perceptual_hash(grey(pixels)))
    stored_as = CONVERTED.get(form) or (
        "jpg" if form == "WEBP" and b"VP8L" not in content else "png"
    )  # lossless
    return _encoded(pixels, stored_as, limits, changes, "444")


def _changes(size: tuple[int, int], orientation: int, limits: Limits, needed: list[str]) -> list[str]:
    """Why an image must be encoded again; empty when it need not."""
    upright = ["turned"] if orientation != 1 else []
    resized = ["resized"] if size_for(*size, limits.short_side) != size else []
    return needed + upright + resized


def _depth(content: bytes, image: Image.Image) -> int:
    """Bits a channel: Pillow gives 8 of 16 for coloured PNG and TIFF, the upper ones."""
    if image.format == "PNG":
        return 16 if content[24] == 16 else 8
    bits = image.tag_v2.get(258, (8,)) if image.format == "TIFF" else (8,)  # BitsPerSample
    return 16 if 16 in (bits if isinstance(bits, tuple) else (bits,)) else 8


def _encoded(pixels: Pixels, extension: str, limits: Limits, changes: list[str], subsampling: str) -> Checked:
    pixels = smaller(pixels, limits.short_side)
    content = as_jpeg(pixels, subsampling) if extension == "jpg" else as_png(pixels)
    height, width = pixels.shape[:2]
    # That of the stored bytes: bits of a mirrored picture, whose odd frequencies are noise, change with the encoding.
    phash = _jpeg_hash(content) if extension == "jpg" else perceptual_hash(grey(pixels))
    return Checked(content, extension, (width, height), "+".join(changes), phash)


def _jpeg_hash(content: bytes) -> str:
    """Perceptual hash of a JPEG, decoded strictly, and no larger than the hash looks at."""
    enough = 2 * HASH_SIDE  # pixels
    luma = simplejpeg.decode_jpeg(content, "GRAY", min_height=enough, min_width=enough, min_factor=2)
    return perceptual_hash(luma[..., 0])


def _damaged(error: Exception) -> BadImage:
    words = str(error).lower()
    is_cut = any(word in words for word in ("truncated", "premature", "end of file", "unexpected end"))
    return BadImage("truncated" if is_cut else "corrupt", str(error))
