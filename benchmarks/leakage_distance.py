"""Which altered copies of photographs does `data_prep leakage` find at which distance, and how many strangers?

`python benchmarks/leakage_distance.py TAR ...`: tars of photographs of different things. Those of the first are
altered in every way below, the copies hashed as training images are and looked up among the views of the originals
(recall); of every tar, all pairs of one photograph's own hash with the views of another are looked at (strangers).
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import keep
from data_prep.doctor.perceptual import grey_of, is_textured, stored_image, views_of

DISTANCES = (0, 2, 4, 6, 8, 10, 12)
MOST = 1500  # photographs of a tar


def _jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    return image.crop(tuple(round(edge) for edge in box))


def _short_side(image: Image.Image, pixels: int) -> Image.Image:
    scale = pixels / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


ALTERATIONS = {
    "encoded again at quality 30": lambda image: _jpeg(image, 30),
    "encoded again at quality 10": lambda image: _jpeg(image, 10),
    "short side 224": lambda image: _jpeg(_short_side(image, 224)),
    "short side 64": lambda image: _jpeg(_short_side(image, 64)),
    "stretched to 256 x 256": lambda image: _jpeg(image.resize((256, 256))),
    "grey": lambda image: _jpeg(image.convert("L")),
    "1.2 times as bright": lambda image: _jpeg(image.point(lambda value: min(255, int(1.2 * value)))),
    "mirrored": lambda image: _jpeg(ImageOps.mirror(image)),
    "mirrored, short side 224, quality 50": lambda image: _jpeg(_short_side(ImageOps.mirror(image), 224), 50),
    **{
        f"{percent} % cut off at every side": lambda image, f=percent / 100: _jpeg(_cut(image, f, f, f, f))
        for percent in (1, 2, 3, 4, 5, 6, 8)
    },
    **{
        f"{percent} % cut off at the left": lambda image, f=percent / 100: _jpeg(_cut(image, f, 0, 0, 0))
        for percent in (2, 3, 4, 5, 8)
    },
    **{
        f"{percent} % cut off at the bottom": lambda image, f=percent / 100: _jpeg(_cut(image, 0, 0, 0, f))
        for percent in (2, 3, 4, 5, 8)
    },
    "square cut from the middle": lambda image: _jpeg(ImageOps.fit(image, (min(image.size),) * 2)),
}


def _photographs(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        members = [
            member for member in tar if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg"))
        ]
        return [tar.extractfile(member).read() for member in members[:MOST]]


def _own(content: bytes) -> int:
    return int(stored_image(content).phash, 16)


def _strangers(photographs: list[bytes], kinds: list[int]) -> dict[str, object]:
    """Pairs of different photographs within each distance, by the own hashes alone and by all views.

    Of different kinds when there are several, else all pairs.
    """
    own = np.array([_own(content) for content in photographs], np.uint64)
    views = np.array([views_of(grey_of(content)) for content in photographs], np.uint64)
    nearest = np.full((len(own), len(own)), 64, np.uint8)
    for view in range(views.shape[1]):
        nearest = np.minimum(nearest, np.bitwise_count(own[:, None] ^ views[None, :, view]))
    plain = np.bitwise_count(own[:, None] ^ own[None])
    other = ~np.eye(len(own), dtype=bool)
    if len(set(kinds)) > 1:
        other = np.array(kinds)[:, None] != np.array(kinds)[None]
    return {
        "photographs": len(own),
        "flat": int((~is_textured(own)).sum()),
        "pairs": int(other.sum()),
        "within by own hash": {str(d): int((plain[other] <= d).sum()) for d in DISTANCES},
        "within by all views": {str(d): int((nearest[other] <= d).sum()) for d in DISTANCES},
        "distance of own hashes, mean and deviation": [
            round(float(plain[other].mean()), 2),
            round(float(plain[other].std()), 2),
        ],
    }


def main(paths: list[Path]) -> None:
    """Alter, look up, count, and keep what came out."""
    tars = {path.stem: _photographs(path) for path in paths}
    originals = next(iter(tars.values()))
    views = np.array([views_of(grey_of(content)) for content in originals], np.uint64)
    found = {}
    for name, alter in ALTERATIONS.items():
        copies = np.array(
            [_own(alter(Image.open(io.BytesIO(content)).convert("RGB"))) for content in originals], np.uint64
        )
        nearest = np.bitwise_count(views ^ copies[:, None]).min(1)
        found[name] = {str(d): round(float((nearest <= d).mean()), 3) for d in DISTANCES}
        print(f"{name:40} {found[name]}")
    strangers = {name: _strangers(photographs, [0] * len(photographs)) for name, photographs in tars.items()}
    if len(tars) > 1:
        kinds = [kind for kind, photographs in enumerate(tars.values()) for _ in photographs]
        every = [content for photographs in tars.values() for content in photographs]
        strangers["of different tars"] = _strangers(every, kinds)
    for name, counts in strangers.items():
        print(name, counts)
    keep(
        "leakage_distance",
        "share of altered copies found among the views of the original within so many bits, and strangers found",
        torch.device("cpu"),
        views=views.shape[1],
        photographs=len(originals),
        found=found,
        strangers=strangers,
    )


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or sys.exit(__doc__))
