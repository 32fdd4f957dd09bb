"""Do folders hold images beside their masks, of which neither is a class? Standard library only, as `schema.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

IMAGES = "images"
MASK_FOLDERS = ("masks", "annotations")  # beside IMAGES, of a set that says what each image shows where


def images_and_masks(folders: Iterable[str]) -> tuple[str, str] | None:
    """The first two of `folders`, or of those above them, that lie beside each other and bear these names.

    Relative names with forward slashes: images/train and masks/train give images and masks. Capitals are no
    difference; None where there are none.
    """
    known: dict[str, str] = {}
    for folder in sorted(folders):
        path = PurePosixPath(folder)
        for one in (path, *path.parents):
            known.setdefault(str(one).lower(), str(one))
    for lower, folder in known.items():
        path = PurePosixPath(lower)
        images = str(path.parent / IMAGES)
        if path.name in MASK_FOLDERS and images in known:
            return known[images], folder
    return None
