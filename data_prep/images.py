"""Is this an image that training can trust? A strict full decode; original bytes are kept whenever they may be.

JPEG is decoded by libjpeg-turbo with warnings as errors, since Pillow accepts damage in the middle of a stream;
PNG by Pillow with every checksum verified; WebP by Pillow (its lossy form has no checksum: only what breaks decoding
shows).
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from data_prep.schema import IMAGE_EXTENSIONS

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's format -> extension
EXIF_ORIENTATION = 0x0112
JPEG_QUALITY = 95  # of images that had to be encoded again


@dataclass(frozen=True)
class Limits:
    """Which images are good enough."""

    min_side: int = 32  # pixels of the shorter side
    max_pixels: int = 178_956_970  # width x height; more is a decompression bomb (Pillow's own limit)
    max_bytes: int = 50 * 2**20  # of the file


@dataclass(frozen=True)
class Checked:
    """A good image: bytes to store, their extension and size, and why they differ from the input ("" = not)."""

    content: bytes
    extension: str
    size: tuple[int, int]
    changed: str


class BadImage(Exception):
    """An input that is no usable image; `reason` is one word for the count."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def check_image(content: bytes, limits: Limits) -> Checked:
    """The image in `content`, fully decoded once; raises BadImage with one of the reasons in the code below.

    Turned (EXIF), CMYK, 16-bit and animated images are encoded again: upright, RGB, 8 bits, first frame.
    """
    if not content:
        raise BadImage("empty", "0 bytes")
    if len(content) > limits.max_bytes:
        raise BadImage("too_large", f"{len(content)} bytes, at most {limits.max_bytes}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is checked here
        image = _opened(content)
        width, height = image.size
        if width * height > limits.max_pixels:
            raise BadImage("too_large", f"{width} x {height} pixels, at most {limits.max_pixels}")
        if min(width, height) < limits.min_side:
            raise BadImage("too_small", f"{width} x {height} pixels, shorter side at least {limits.min_side}")
        extension = EXTENSIONS.get(image.format or "")
        if extension is None:
            raise BadImage("unknown_format", f"{image.format}, use one of {IMAGE_EXTENSIONS}")
        _decode_strictly(content, image)
        try:
            changed = _why_changed(image, extension)
            if not changed:
                return Checked(content, extension, (width, height), "")
            return _encoded_again(image, extension, changed)
        except (OSError, ValueError, SyntaxError) as error:
            raise BadImage("corrupt", str(error)) from error


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise BadImage("too_large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise BadImage("not_an_image", "no known image format") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise BadImage("corrupt", str(error)) from error


def _decode_strictly(content: bytes, image: Image.Image) -> None:
    try:
        if image.format in ("JPEG", "MPO"):
            space = "CMYK" if image.mode == "CMYK" else "RGB"
            simplejpeg.decode_jpeg(content, colorspace=space, strict=True)
        else:
            Image.open(io.BytesIO(content)).verify()
            image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        words = str(error).lower()
        is_cut = any(word in words for word in ("truncated", "premature", "end of file", "unexpected end"))
        raise BadImage("truncated" if is_cut else "corrupt", str(error)) from error


def _why_changed(image: Image.Image, extension: str) -> str:
    if image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1):
        return "turned"
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        return f"mode_{image.mode}".replace(";", "_")
    if getattr(image, "n_frames", 1) > 1 and extension != "jpg":
        return "first_frame"
    return ""


def _encoded_again(image: Image.Image, extension: str, changed: str) -> Checked:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: scaled, where Pillow's own conversion would clip
        image = Image.fromarray((np.asarray(image, np.float32) / 257 + 0.5).clip(0, 255).astype(np.uint8))
    elif image.mode not in ("L", "RGB", "RGBA") or extension == "jpg":
        has_alpha = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    buffer = io.BytesIO()
    if extension == "jpg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        extension = "png"
        image.info.clear()
        image.save(buffer, "PNG")
    return Checked(buffer.getvalue(), extension, image.size, changed)
