"""How do decoded pixels become those that are stored? On white, 8 bits, grey or RGB, small enough; and their hash.

Colour profiles (ICC) are never applied: the numbers of a pixel stay what they were. CMYK becomes RGB by
(1 - C)(1 - K), as other decoders do it; JPEG stores it inverted, which Pillow undoes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image

JPEG_QUALITY = 95  # of images that had to be encoded again
TRANSPARENT = ("LA", "PA", "RGBA", "La", "RGBa")  # Pillow's modes
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
BLUR = 0.45  # pixels of the new picture; 0.4 and 0.5 are further from Lanczos
LEAST_BLUR = 0.2  # pixels; less changes nothing
HASH_SIDE = 32  # pixels, side of the picture that the perceptual hash sees
HASH_BITS = 8  # low frequencies a side
EXIF_ORIENTATION = 0x0112  # tag
# EXIF orientation -> how to turn the stored pixels upright; by OpenCV, since Pillow would hold them three times more.
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.flip(cv2.transpose(pixels), -1),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}

Pixels = UInt8[np.ndarray, "_ _"] | UInt8[np.ndarray, "_ _ 3"]  # grey, or RGB


def with_key(image: Image.Image, content: bytes) -> Image.Image:
    """An opened image; of a PNG the one colour that is transparent (tRNS) is told as Pillow tells the pixels.

    It scales those of 2 and 4 bits to 8, of 16 bits in RGB it has the upper 8, and leaves that colour as it was.
    """
    key = image.info.get("transparency")
    if image.format == "PNG" and key is not None:
        depth = content[24]  # bits a channel
        if image.mode == "L" and depth in (2, 4):
            most = 2**depth - 1
            image.info["transparency"] = (key & most) * (255 // most)
        elif image.mode == "RGB" and depth == 16:
            image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def holes(image: Image.Image, values: Shaped[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Which pixels of an image of SIXTEEN_BIT, given their values too, are transparent."""
    return values == image.info.get("transparency", -1)


def is_transparent(image: Image.Image) -> bool:
    """Whether anything of a loaded image lets its background through."""
    if image.mode not in TRANSPARENT and "transparency" not in image.info:
        return False
    if image.mode in SIXTEEN_BIT:
        return bool(holes(image, np.asarray(image)).any())
    alpha = image if image.mode in TRANSPARENT else image.convert("RGBA")
    return alpha.getchannel("A" if "A" in alpha.getbands() else "a").getextrema()[0] < 255


def orientation_of(image: Image.Image) -> int:
    """How EXIF says that a picture is turned, 1 to 8; 1 also where EXIF is damaged: it is no pixel."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the same damage, half of which Pillow tells so
            turn = image.getexif().get(EXIF_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # what Pillow raises there is not listed anywhere
        return 1
    return int(turn) if turn in range(1, 9) else 1


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """The stored pixels of a picture as EXIF wants them shown, which says 1 to 8."""
    return pixels if orientation == 1 else TURNED[orientation](pixels)


def plain(image: Image.Image) -> Pixels:
    """The pixels of a loaded image: upright, 8 bits, grey or RGB, transparent ones on white.

    Raises ValueError for colours that have no such form: 32 bits a channel, CIE Lab.
    """
    return turned(_stored_plain(image), orientation_of(image))


def _stored_plain(image: Image.Image) -> Pixels:
    if image.mode in SIXTEEN_BIT:
        deep = np.asarray(image)
        pixels = (deep.astype(np.float32) / 257 + 0.5).astype(np.uint8)
        pixels[holes(image, deep)] = 255
        return pixels
    if image.mode in ("I", "F", "LAB"):
        raise ValueError(f"mode {image.mode} has no one form in 8 bits")
    if is_transparent(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))


def smaller(pixels: Pixels, short_side: int) -> Pixels:
    """The picture with this short side in pixels, without aliasing; never enlarged. 0 leaves it as it is.

    From twice the size on it is the mean over areas (OpenCV's INTER_AREA), which takes as long as decoding does.
    Below, a Gaussian blur and cubic interpolation: as near to Pillow's Lanczos filter (photographs of 640 px at 256:
    38.2 dB, INTER_AREA 38.3; at 320: 39.3 and 38.0) in a third of the time.
    """
    height, width = pixels.shape[:2]
    size = size_for(width, height, short_side)
    if size == (width, height):
        return pixels
    factor = min(width, height) / short_side
    if factor >= 2:
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    sigma = BLUR * (factor * factor - 1) ** 0.5
    if sigma > LEAST_BLUR:
        pixels = cv2.GaussianBlur(pixels, (5, 5), sigma)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)


def size_for(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height of a picture whose short side became `short_side`; 0, or a smaller one, changes nothing."""
    if not short_side or min(width, height) <= short_side:
        return width, height
    scale = short_side / min(width, height)
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def as_jpeg(pixels: Pixels, subsampling: str) -> bytes:
    """A JPEG file of quality JPEG_QUALITY; `subsampling` of the colours is 444 or 420."""
    if pixels.ndim == 2:
        grey = np.ascontiguousarray(pixels)[..., None]
        return simplejpeg.encode_jpeg(grey, JPEG_QUALITY, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), JPEG_QUALITY, "RGB", subsampling)


def as_png(pixels: Pixels) -> bytes:
    """A PNG file, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def grey(pixels: Pixels) -> UInt8[np.ndarray, "h w"]:
    """Luma of a picture."""
    return pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def perceptual_hash(pixels: UInt8[np.ndarray, "h w"]) -> str:
    """16 hexadecimal digits that change in few bits when a picture is resized, encoded again or a little brighter.

    The pHash of Zauner 2010 ("Implementation and Benchmarking of Perceptual Image Hash Functions"), as the package
    imagehash has it: which of the 8 x 8 lowest frequencies of a 32 x 32 picture exceed their median. Whole numbers
    from the cosines on, so that every machine says the same; float64 holds them exactly (all are below 2**43), and
    its products are fast.
    """
    factor = min(pixels.shape) // (2 * HASH_SIDE)
    if factor > 1:  # first by whole factors, which is fast
        height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
        whole = pixels[: height * factor, : width * factor]
        pixels = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    small = cv2.resize(pixels, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float64)
    low = _COSINES @ small @ _COSINES.T
    bits = np.packbits((2 * low > _twice_median(low)).ravel())
    return bits.tobytes().hex()


def _twice_median(values: np.ndarray) -> float:
    ordered = np.sort(values, axis=None)
    return ordered[ordered.size // 2 - 1] + ordered[ordered.size // 2]


def _cosines() -> np.ndarray:
    """The lowest rows of the cosine transform (DCT-II), in 1/4096."""
    frequency, place = np.arange(HASH_BITS)[:, None], np.arange(HASH_SIDE)[None]
    return np.rint(4096 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * HASH_SIDE)))


_COSINES = _cosines()
