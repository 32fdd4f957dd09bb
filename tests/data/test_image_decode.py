"""Are damaged images refused, and the others decoded to upright RGB?"""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.doctor.perceptual import grey_of
from data_prep.images import check_image
from data_prep.limits import Limits
from pretrain.data import decode
from pretrain.data.decode import decode_image
from pretrain.data.faults import BadSample
from tests.data.sets import encoded, picture


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_images_come_back_exactly(form: str, options: dict[str, object]) -> None:
    pixels = picture(1)
    assert np.array_equal(decode_image(encoded(pixels, form, **options)).numpy(), pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_agrees_with_pillow(mode: str) -> None:
    content = saved(Image.fromarray(picture(2)).convert(mode), "JPEG", quality=90)
    reference = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    found = decode_image(content).numpy()
    assert found.shape == (40, 52, 3)
    assert np.abs(found - reference).max() <= 4  # two builds of libjpeg-turbo: upsampling rounds differently


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparency_becomes_white(form: str) -> None:
    pixels = np.dstack([picture(3), np.zeros((40, 52), np.uint8)])
    pixels[:, 30:, 3] = 255
    options = {"lossless": True} if form == "WEBP" else {}
    found = decode_image(encoded(pixels, form, **options)).numpy()
    assert (found[:, :30] == 255).all() and np.array_equal(found[:, 30:], pixels[:, 30:, :3])


def test_a_palette_with_a_transparent_colour_becomes_white_there() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 1), 1)
    found = decode_image(saved(image, "PNG", transparency=0)).numpy()
    assert found[0, 0].tolist() == [255, 255, 255] and found[1, 1].tolist() == [0, 0, 255]


def test_an_image_is_the_same_converted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.dstack([picture(3), picture(4)[..., 0]])
    content = encoded(pixels, "PNG")
    whole = decode_image(content)
    monkeypatch.setattr(decode, "PART", 3 * 52)
    assert np.array_equal(decode_image(content), whole)
    shown = pixels[..., :3].astype(float)
    opaque = pixels[..., 3:] / 255
    assert np.abs(shown * opaque + 255 * (1 - opaque) - whole.numpy()).max() <= 1


def test_sixteen_bits_are_scaled_not_cut() -> None:
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    found = decode_image(saved(Image.fromarray(grey), "PNG")).numpy()
    assert np.array_equal(found[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner = np.zeros((32, 64, 3), np.uint8)
    corner[:16, :16] = 255  # stored top left
    options = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    found = decode_image(encoded(corner, form, exif=exif.tobytes(), **options)).numpy()
    bottom, right = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[
        orientation
    ]
    assert found.shape == ((32, 64, 3) if orientation < 5 else (64, 32, 3))
    bright = found[-8:, :] if bottom else found[:8, :]
    bright = bright[:, -8:] if right else bright[:, :8]
    assert bright.mean() > 240 and found.mean() < 60


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [b"XXXXXXXXXX", b"II", b"II*\0", b"II*\0\xff\xff\xff\xff", bytes(8), b"II*\0\x08\0\0\0\x01\0\x12\x01"],
)
def test_damaged_exif_turns_nothing_as_when_data_sets_are_built(form: str, exif: bytes) -> None:
    # A JPEG with a density: of one without, Pillow reads EXIF as it opens the file, and swallows the damage.
    options = {"lossless": True} if form == "WEBP" else {"dpi": (72, 72)}
    content = encoded(picture(2), form, exif=b"Exif\0\0" + exif, **options)
    assert np.array_equal(decode_image(content), decode_image(encoded(picture(2), form, **options)))
    assert check_image(content, Limits()).content == content
    assert grey_of(content).shape == (40, 52)  # of the doctor, who looks for near copies


def test_whatever_bytes_change_a_file_is_decoded_or_refused() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "of a camera"
    image = Image.fromarray(picture(0))
    whole = [
        saved(image, "JPEG", exif=exif, dpi=(72, 72)),
        saved(image.convert("CMYK"), "JPEG", exif=exif, dpi=(72, 72)),
        saved(image, "PNG", exif=exif),
        saved(image.convert("P"), "PNG", transparency=3),
        saved(image, "WEBP", exif=exif),
    ]
    draw, outcomes = random.Random(0), {True: 0, False: 0}
    for _ in range(2000):
        content = bytearray(draw.choice(whole))
        for _ in range(draw.choice([1, 2, 10])):  # most in the header
            at = draw.randrange(min(len(content), draw.choice([60, 400, len(content)])))
            content[at : at + draw.choice([0, 1, 1, 9])] = draw.randbytes(draw.choice([1, 1, 1, 9]))
        try:
            outcomes[decode_image(bytes(content)).ndim == 3] += 1
        except BadSample:
            outcomes[False] += 1
    assert min(outcomes.values()) > 100


def test_exif_is_found_behind_other_segments_and_only_as_a_segment() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(2, 32, 64), exif=exif.tobytes())
    plain = encoded(picture(2, 32, 64))
    comment = b"\xff\xfe\x00\x0eExif\0\0\xff\xda\xff\xd9\0\0"  # the word, and marks of a scan, in a comment
    filled = b"\xff\xff\xff"  # markers may be filled up so
    assert decode_image(turned[:2] + comment + filled + turned[2:]).shape == (64, 32, 3)
    assert decode_image(plain[:2] + comment + filled + plain[2:]).shape == (32, 64, 3)
    assert decode.plain_jpeg_size(turned[:2] + comment + turned[2:]) is None
    assert decode.plain_jpeg_size(plain[:2] + comment + plain[2:]) == (32, 64)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_image_is_refused(form: str, share: float) -> None:
    content = encoded(picture(4, 200, 300), form)
    with pytest.raises(BadSample) as caught:
        decode_image(content[: int(len(content) * share)])
    assert caught.value.reason in ("truncated", "corrupt")


def test_damage_in_the_middle_of_a_jpeg_is_refused() -> None:
    content = bytearray(encoded(picture(5, 200, 300), quality=90))
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(range(0xC0, 0xE8))
    with pytest.raises(BadSample):
        decode_image(bytes(content))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\xff\xd8", b"GIF89a", bytes(3000)])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        decode_image(content)
    assert caught.value.reason in ("not_an_image", "truncated", "corrupt")


@pytest.mark.parametrize("form", ["EPS", "BMP", "TIFF", "GIF"])
def test_what_pillow_would_open_besides_is_refused(form: str) -> None:
    """Some formats it hands to programs of the machine."""
    with pytest.raises(BadSample, match="no JPEG, PNG or WebP file") as caught:
        decode_image(encoded(picture(6), form))
    assert caught.value.reason == "not_an_image"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_huge_image_is_refused_from_its_header(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_WEBP_PIXELS" if form == "WEBP" else "MAX_PIXELS", 1000)
    if form == "WEBP":  # its reader takes memory for the picture as it opens it
        monkeypatch.setattr(decode.Image, "open", None)
    with pytest.raises(BadSample, match="52 x 40 pixels exceed") as caught:
        decode_image(encoded(picture(6), form))
    assert caught.value.reason == "too_large"


def test_a_decompression_bomb_is_refused() -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)  # 1 bit a pixel
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    with pytest.raises(BadSample) as caught:
        decode_image(content)
    assert caught.value.reason == "too_large"
