"""Which class does a folder of masks give to each pixel of a folder of images?

images/NAME.{jpg,png,webp} has its classes in masks/NAME.png, numbers in one channel; line i of classes.txt names
number i, a line `-` one that is neither taught nor judged (ADE20k's 0), as is 255.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pretrain.data.faults import BadSample
from pretrain.evaluate.apart import resolved
from pretrain.evaluate.masks import UNREADABLE, opened
from pretrain.intact import sha256
from pretrain.transfer.examples import IGNORED, Drops, Example, read_image, repeated

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ONE_CHANNEL = ("1", "L", "P", "I", "I;16")
UNNAMED = "-"


@dataclass(frozen=True)
class MaskPlaces:
    images: Path
    masks: Path
    classes: Path


class MaskFolder:
    """An AnnotatedSet for segmentation; sizes and names of all pairs are compared when it is opened.

    Raises FileNotFoundError and ValueError.
    """

    category_ids: tuple[int, ...] = ()
    has_masks, federation, shown = False, None, None

    def __init__(self, places: MaskPlaces, max_bad: float) -> None:
        self.places = places
        self.names, self._numbers = read_classes(places.classes)
        found = [path for path in sorted(places.images.iterdir()) if path.suffix.lower() in SUFFIXES]
        images = {path.stem: path for path in found}
        masks = {path.stem: path for path in sorted(places.masks.iterdir()) if path.suffix.lower() == ".png"}
        if not images:
            raise FileNotFoundError(
                f"{places.images} has no file of {SUFFIXES}: name the folder of the images"
            )
        drops = Drops()
        shared = {stem for stem, count in Counter(path.stem for path in found).items() if count > 1}
        for path in found:
            if path.stem in shared:
                drops.add(
                    "shared_mask",
                    f"{path} is one of several images of one name and mask: rename all but one",
                )
        for stem in sorted(images.keys() ^ masks.keys()):
            reason = "missing_mask" if stem in images else "missing_image"
            drops.add(reason, f"{stem} is not in both of {places.images} and {places.masks}")
        self._pairs: list[tuple[Path, Path]] = []
        for stem in sorted((images.keys() & masks.keys()) - shared):
            try:
                _check_pair(images[stem], masks[stem])
                self._pairs.append((images[stem], masks[stem]))
            except BadSample as error:
                drops.add(error.reason, str(error))
        drops.require_few(f"pairs of {places.images}", len(found), max_bad)
        self.dropped = drops.counts
        self.image_ids = tuple(range(len(self._pairs)))
        self.files = resolved(image for image, _ in self._pairs)
        self.place, self.sha256 = places.images, _fingerprint(places.classes, self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def example(self, index: int) -> Example:
        image_path, mask_path = self._pairs[index]
        image = read_image(image_path)
        try:
            with opened(mask_path) as mask:
                numbers = np.array(mask).astype(np.int64)
        except UNREADABLE as error:
            raise BadSample("bad_mask", f"{mask_path}: {error}") from error
        if numbers.shape != tuple(image.shape[:2]):
            raise BadSample(
                "mask_size", f"{mask_path} has {numbers.shape}, its image {tuple(image.shape[:2])}"
            )
        unknown = numbers[(numbers >= len(self._numbers)) & (numbers != IGNORED)]
        if unknown.size or numbers.min() < 0:
            raise BadSample(
                "unknown_class",
                f"{mask_path} has number {int(unknown.max(initial=-1))}, {self.places.classes} names "
                f"{len(self._numbers)}",
            )
        table = np.full(IGNORED + 1, IGNORED, np.uint8)
        table[: len(self._numbers)] = self._numbers
        classes = table[numbers]
        if (classes == IGNORED).all():
            raise BadSample("nothing_named", f"{mask_path} has no pixel of a class")
        return Example(image.permute(2, 0, 1), index, classes=torch.from_numpy(classes))


def _fingerprint(classes: Path, pairs: list[tuple[Path, Path]]) -> str:
    """SHA-256 of the names of the classes, the masks, and name and size of each image, which are too many to read."""
    found = hashlib.sha256(classes.read_bytes())
    for image, mask in pairs:
        found.update(f"{image.name} {image.stat().st_size} {sha256(mask)}\n".encode())
    return found.hexdigest()


def read_classes(path: Path) -> tuple[tuple[str, ...], list[int]]:
    """Names of the classes, and by number in a mask the number of the name, or IGNORED."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: write the names of the classes into it, line i for number i of the masks, `-` for "
            "one that is neither taught nor judged"
        )
    try:
        lines = path.read_text("utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 ({error}): save the names of the classes as UTF-8") from error
    names = tuple(line.strip() for line in lines if line.strip() != UNNAMED)
    if len(names) < 2 or "" in names or len(lines) > IGNORED:
        empty = ", an empty one among them" if "" in names else ""
        raise ValueError(f"{path} has {len(names)} names{empty}: 2 to {IGNORED} are needed, a line each")
    if twice := repeated(names):
        raise ValueError(f"{path} names {twice!r} twice: classes are told apart by their names, rename one")
    numbers = [IGNORED if line.strip() == UNNAMED else names.index(line.strip()) for line in lines]
    return names, numbers


def _check_pair(image: Path, mask: Path) -> None:
    """Reads the two headers."""
    try:
        with opened(image) as header:
            size = header.size
        with opened(mask) as header:
            mask_size, mode = header.size, header.mode
    except UNREADABLE as error:
        raise BadSample("unreadable", f"{image} or {mask}: {error}") from error
    if mode not in ONE_CHANNEL:
        raise BadSample("mask_colours", f"{mask} has mode {mode}: one channel of class numbers is needed")
    if size != mask_size and size != mask_size[::-1]:  # turned by its EXIF record
        raise BadSample("mask_size", f"{mask} has {mask_size} pixels, {image} has {size}")
