"""Which pixels does an encoded image hold?"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data_prep.headers import MAX_PIXELS, MAX_WEBP_PIXELS, webp_size
from data_prep.pixels import SIXTEEN_BIT, TRANSPARENT, holes, orientation_of, turned, with_key
from pretrain.data.faults import BadSample

PART = 2**22  # pixels that Pillow converts at once
APP1, START_OF_SCAN = b"\xe1", b"\xda"  # markers of JPEG segments, after 0xff
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
)  # Pillow would hand others to programs of the machine, as EPS to Ghostscript


def decode_image(content: bytes) -> UInt8[Tensor, "h w 3"]:
    """RGB pixels of a JPEG, PNG or WebP file, upright, transparency on white, 16 bits scaled to 8.

    EXIF that is damaged turns nothing, as when data sets are built: it is no pixel.
    Strict: raises BadSample with reason `not_an_image`, `truncated`, `corrupt` or `too_large` (more than
    MAX_PIXELS, of WebP MAX_WEBP_PIXELS) where other decoders deliver a grey rest or fill the memory.
    """
    is_jpeg = content[:2] == b"\xff\xd8"
    return torch.from_numpy(_decode_jpeg(content) if is_jpeg else _decode_with_pillow(content))


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width of a whole JPEG file whose pixels need no turning and no colour profile of print shops.

    None for everything else, which is left to `decode_image`: that also says what is wrong with it.
    """
    is_whole = content[:2] == b"\xff\xd8" and content.rstrip(b"\0")[-2:] == b"\xff\xd9"
    if not is_whole or _has_exif(content):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (height, width) if colorspace in ("YCbCr", "Gray") and height * width <= MAX_PIXELS else None


def _decode_jpeg(content: bytes) -> np.ndarray:
    """libjpeg-turbo with every warning an error: it alone notices damage in the middle of the file."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
        _check_size(width, height)
        if colorspace not in ("YCbCr", "Gray", "RGB"):  # CMYK of print shops
            return _decode_with_pillow(content)
        pixels = simplejpeg.decode_jpeg(content, colorspace="RGB", strict=True)
    except ValueError as error:
        if isinstance(error, BadSample):
            raise
        raise _bad(error) from error
    if not _has_exif(content):
        return pixels
    with _damage_of_pillow():
        return turned(pixels, orientation_of(_opened(content)))


def _has_exif(content: bytes) -> bool:
    """Whether a segment of a JPEG file before its pixels is EXIF.

    From segment to segment: to search a file of 56 kB for the word takes a twentieth of its decoding.
    """
    at = 2
    while content[at : at + 1] == b"\xff" and (marker := content[at + 1 : at + 2]) not in (
        b"",
        START_OF_SCAN,
    ):
        if marker == b"\xff":  # filling
            at += 1
            continue
        if marker == APP1 and content[at + 4 : at + 10] == b"Exif\0\0":
            return True
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return False


def _decode_with_pillow(content: bytes) -> np.ndarray:
    with _damage_of_pillow():
        if (size := webp_size(content)) is not None:  # Pillow takes memory for one as it opens it
            _check_size(*size, MAX_WEBP_PIXELS)
        image = _opened(content)
        _check_size(*image.size)
        image.load()
        return turned(_rgb_of(image), orientation_of(image))


def _opened(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes, where _check_size is stricter, and of metadata
        return with_key(Image.open(io.BytesIO(content), formats=FORMATS), content)


@contextmanager
def _damage_of_pillow() -> Iterator[None]:
    """What Pillow raises in here is BadSample: it is not listed anywhere, and no one file may end a run."""
    try:
        yield
    except (BadSample, MemoryError):  # too little memory is no fault of the file
        raise
    except UnidentifiedImageError as error:
        raise BadSample("not_an_image", "the first bytes are of no JPEG, PNG or WebP file") from error
    except Image.DecompressionBombError as error:
        raise BadSample("too_large", str(error)) from error
    except Exception as error:
        raise _bad(error) from error


def _rgb_of(image: Image.Image) -> np.ndarray:
    """Part by part: all at once, a large image with transparency would lie in memory five times."""
    width, height = image.size
    pixels, rows = np.empty((height, width, 3), np.uint8), max(PART // max(width, 1), 1)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = _to_rgb(image.crop((0, top, width, bottom)))
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT:
        deep = np.asarray(image)
        grey = (deep.astype(np.uint32) // 257).astype(np.uint8)
        grey[holes(image, deep)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, (255, 255, 255))
        ground.paste(image, mask=image)
        return ground
    return image.convert("RGB")


def _check_size(width: int, height: int, most: int | None = None) -> None:
    most = MAX_PIXELS if most is None else most
    if width * height > most:
        raise BadSample("too_large", f"{width} x {height} pixels exceed the limit of {most}")


def _bad(error: Exception) -> BadSample:
    """The reason behind a decoder's message: the file ends early, or it is damaged inside."""
    message = str(error)
    ends_early = any(word in message.lower() for word in ("truncated", "premature", "broken data stream"))
    return BadSample("truncated" if ends_early else "corrupt", message)
