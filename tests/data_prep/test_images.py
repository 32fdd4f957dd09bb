"""Does every odd, broken and hostile image get its verdict, and is what is stored what one would have seen?"""

from __future__ import annotations

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from PIL import Image, features

from data_prep.download.connect import Failed
from data_prep.images import check_image
from data_prep.limits import BadImage, Limits
from data_prep.pixels import perceptual_hash, smaller
from pretrain.data.decode import decode_image
from pretrain.data.faults import BadSample
from tests.data_prep.malformed_images import BOMBS, TABLE, TOO_LARGE, Case, encoded, picture
from tests.paths import ROOT

CASES = [case for case in TABLE if "avif" not in case.name or features.check("avif")]


def _verdict(case: Case) -> str:
    content = case.make()
    try:
        checked = check_image(content, Limits())
    except BadImage as bad:
        return f"refused: {bad.reason}"
    return f"changed: {checked.changed}" if checked.content != content else "kept"


def test_the_table_holds_more_than_sixty_odd_images_with_different_names():
    assert (
        len({case.name for case in TABLE}) == len(TABLE) >= 60 + sum(case.verdict == "kept" for case in TABLE)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_image_gets_the_verdict_of_the_table(case):
    assert _verdict(case) == case.verdict


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.verdict.startswith("changed")], ids=lambda case: case.name
)
def test_what_is_stored_again_is_plain_and_shows_what_the_reader_would_have_seen(case):
    content = case.make()
    checked = check_image(content, Limits())
    stored = Image.open(io.BytesIO(checked.content))
    assert stored.format == {"jpg": "JPEG", "png": "PNG"}[checked.extension]
    assert stored.mode in ("L", "RGB") and stored.size == checked.size and not stored.info.get("exif")
    try:
        before = decode_image(content).numpy().astype(int)
    except BadSample:
        pytest.skip("a format that the reader does not take")
    difference = np.abs(decode_image(checked.content).numpy().astype(int) - before)
    if checked.extension == "png":
        assert difference.max() <= 1  # 16 bits are rounded here and cut there
    else:
        assert difference.mean() < 2  # another pass of JPEG at quality 95


def test_bombs_are_refused_without_memory_for_their_pixels():
    script = (
        "import resource\n"
        "from data_prep.images import check_image\n"
        "from data_prep.limits import BadImage, Limits\n"
        "from tests.data_prep.malformed_images import BOMBS\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "contents = [make() for name, make, reason in BOMBS]\n"
        "before = peak()\n"
        "for content in contents:\n"
        "    try:\n"
        "        check_image(content, Limits())\n"
        "    except BadImage:\n"
        "        continue\n"
        "    raise SystemExit('one was taken')\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) < 8  # MiB; the smallest of them would take 50
    assert len(BOMBS) >= 12


@pytest.mark.parametrize(
    ("form", "make"), TOO_LARGE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_training_refuses_for_its_size_is_not_stored_unless_it_is_reduced(form, make):
    with pytest.raises(BadSample) as refused:
        decode_image(make())
    assert refused.value.reason == "too_large"
    with pytest.raises(BadImage, match=r"training takes at most \d+: reduce it") as dropped:
        check_image(make(), Limits())
    assert dropped.value.reason == "too_large"
    with pytest.raises(BadImage) as read:  # these hold no pixels, which only who reads on finds out
        check_image(make(), Limits(short_side=256))
    assert read.value.reason != "too_large"


def test_an_error_that_no_decoder_promised_refuses_the_image_and_names_its_type(monkeypatch):
    def failing(*arguments, **options):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", failing)
    with pytest.raises(BadImage, match="corrupt: unexpected ZeroDivisionError: by zero"):
        check_image(encoded("JPEG"), Limits())


@pytest.mark.parametrize("error", [BadImage("corrupt", "half of it"), Failed("http_503", "busy", 2.5)])
def test_what_is_wrong_with_an_image_reaches_another_process(error):
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is type(error) and str(sent) == str(error) and vars(sent) == vars(error)


def test_too_little_memory_is_no_fault_of_the_image(monkeypatch):
    def failing(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", failing)
    with pytest.raises(MemoryError):
        check_image(encoded("JPEG"), Limits())


def test_cmyk_becomes_the_colours_that_were_meant():
    flat = Image.new("CMYK", (64, 64), (0, 255, 255, 0))  # no cyan, all of magenta and yellow: red
    for form in ("JPEG", "TIFF"):  # JPEG stores it inverted
        shown = decode_image(check_image(encoded(form, flat), Limits()).content).numpy()
        assert np.abs(shown.reshape(-1, 3).astype(int) - [255, 0, 0]).max() <= 4


def test_transparent_places_are_white():
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert decode_image(check_image(encoded("PNG", image), Limits()).content).min() == 255


def test_colour_profiles_are_kept_with_the_file_and_never_applied():
    case = next(case for case in TABLE if case.name == "jpeg_cmyk_profile")
    assert "icc_profile" not in Image.open(io.BytesIO(check_image(case.make(), Limits()).content)).info
    with_profile = next(case for case in TABLE if case.name == "jpeg_foreign_profile").make()
    checked = check_image(with_profile, Limits())
    assert checked.content == with_profile and checked.phash == check_image(encoded("JPEG"), Limits()).phash


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_reduced_to_the_short_side_and_never_enlarged(form):
    large = picture(width=600, height=400)
    reduced = check_image(encoded(form, large), Limits(short_side=100))
    assert reduced.size == (150, 100) and reduced.changed == "resized"
    assert decode_image(reduced.content).shape == (100, 150, 3)
    small = encoded(form, large)
    kept = check_image(small, Limits(short_side=400))
    assert kept.content == small and kept.size == (600, 400)


def test_reducing_is_the_mean_over_an_area_also_where_jpeg_is_decoded_at_half_size():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    content = simplejpeg.encode_jpeg(noise, quality=100, colorsubsampling="444")
    reduced = decode_image(check_image(content, Limits(short_side=64)).content).numpy().astype(float)
    means = noise.reshape(64, 8, 64, 8, 3).mean((1, 3))
    assert np.abs(reduced - means).mean() < 4  # JPEG at quality 95, and values clipped at half size


@pytest.mark.parametrize("short_side", [390, 300, 220, 150])
def test_reducing_neither_shifts_nor_brightens_and_is_near_lanczos(short_side):
    pixels = np.asarray(picture(width=600, height=400, seed=3))
    reduced = smaller(pixels, short_side).astype(int)
    mirrored = smaller(np.ascontiguousarray(pixels[::-1, ::-1]), short_side)[::-1, ::-1].astype(int)
    assert np.abs(reduced - mirrored).max() <= 2
    lanczos = Image.fromarray(pixels).resize((reduced.shape[1], short_side), Image.Resampling.LANCZOS)
    assert np.abs(reduced - np.asarray(lanczos).astype(int)).mean() < 0.5
    stripes = np.zeros((400, 600), np.uint8)
    stripes[:, ::2] = 255  # finer than the new pixels: grey, not bands
    if short_side <= 220:
        assert smaller(stripes, short_side)[:, 4:-4].std() < 32


def test_a_turned_image_is_reduced_by_what_is_seen():
    exif = Image.Exif()
    exif[0x0112] = 6
    checked = check_image(encoded("JPEG", picture(width=300, height=200), exif=exif), Limits(short_side=100))
    assert checked.size == (100, 150) and checked.changed == "turned+resized"


def test_limits_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="short_side=20 is below min_side=32"):
        Limits(short_side=20)
    with pytest.raises(ValueError, match=r"max_aspect=0.5 .* at least 1"):
        Limits(max_aspect=0.5)


def _bits(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def test_the_perceptual_hash_stays_where_the_picture_does_and_moves_where_it_changes():
    image = picture(width=400, height=300)
    phash = check_image(encoded("PNG", image), Limits()).phash
    assert len(phash) == 16 and int(phash, 16)
    for same in (
        encoded("JPEG", image, quality=60),
        encoded("WEBP", image, quality=50),
        encoded("JPEG", image.resize((200, 150))),
        encoded("PNG", image.point(lambda value: min(255, value + 8))),
    ):
        assert _bits(phash, check_image(same, Limits()).phash) <= 6
    others = [check_image(encoded("PNG", picture(seed=seed)), Limits()).phash for seed in range(1, 9)]
    assert min(_bits(phash, other) for other in others) >= 14


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_the_perceptual_hash_is_that_of_the_stored_bytes(form):
    """Also of a picture that is its own mirror image: half of its frequencies are the noise of the encoding."""
    half = np.asarray(picture(width=150, height=300, seed=3))
    mirrored = Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1))
    checked = check_image(encoded(form, mirrored), Limits(short_side=200))
    assert checked.changed and checked.phash == check_image(checked.content, Limits()).phash


def test_the_perceptual_hash_of_a_ramp_is_that_of_its_definition():
    """A ramp from left to right has frequencies in the first row alone; those below the median are not set."""
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    place, frequency = np.arange(32), np.arange(8)
    cosines = np.rint(4096 * np.cos(np.pi * np.outer(frequency, 2 * place + 1) / 64)).astype(np.int64)
    low = cosines @ ramp.astype(np.int64) @ cosines.T
    expected = "".join("1" if value > np.median(low) else "0" for value in low.ravel())
    assert perceptual_hash(ramp) == f"{int(expected, 2):016x}"


def test_the_perceptual_hash_is_nearly_that_of_imagehash():
    imagehash = pytest.importorskip("imagehash", reason="the package imagehash is not installed")
    for seed in range(8):
        image = picture(width=300, height=200, seed=seed)
        theirs = str(imagehash.phash(image))
        assert _bits(theirs, check_image(encoded("PNG", image), Limits()).phash) <= 6  # another filter
