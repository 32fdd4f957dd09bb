"""What does LVIS's format say beyond COCO's? Which categories are known to be absent, and how often each occurs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from pretrain.transfer.examples import AnnotatedSet, Federation
from pretrain.transfer.recipes import Detect, Segment

FREQUENCIES = ("r", "c", "f")
NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"  # of an image
FREQUENCY = "frequency"  # of a category
FEDERATED = "federated"  # of a recipe's options: categories that a step judges
FORMAT = "https://www.lvisdataset.org/dataset"

Entry = Mapping[str, Any]


def federation_of(path: Path, images: Iterable[Entry], categories: Iterable[Entry]) -> Federation | None:
    """None for a file whose images lack LVIS's fields; ValueError where some are missing or have other values."""
    images, categories = list(images), list(categories)
    if not any(NEGATIVE in image or NOT_EXHAUSTIVE in image for image in images):
        return None
    return Federation(
        {image["id"]: _categories(path, image, NEGATIVE) for image in images},
        {image["id"]: _categories(path, image, NOT_EXHAUSTIVE) for image in images},
        {category["id"]: _frequency(path, category) for category in categories},
    )


def require_federation(name: str, recipe: Segment | Detect, sets: Iterable[AnnotatedSet]) -> None:
    """ValueError where a recipe judges categories as LVIS does, and a set tells nothing of those that are absent."""
    is_federated = isinstance(recipe, Detect) and bool(recipe.options.get(FEDERATED))
    if lacking := [one.place for one in sets if is_federated and one.federation is None]:
        raise ValueError(
            f"--recipe {name} is of LVIS's categories, of which most are unknown in an image, and {lacking[0]} has "
            f"{NEGATIVE} and {NOT_EXHAUSTIVE} of no image: each image must tell both, and each category its "
            f"{FREQUENCY}, see {FORMAT}; name files of LVIS, or take a recipe of COCO, such as coco or small"
        )


def _categories(path: Path, image: Entry, name: str) -> frozenset[int]:
    found = image.get(name)
    if not isinstance(found, list) or not all(type(number) is int for number in found):
        raise ValueError(
            f"{path} has {name}={brief(found)} of image {image['id']}, a list of numbers of categories is needed, as "
            f"its images have LVIS's fields: see {FORMAT}, or take {NEGATIVE} and {NOT_EXHAUSTIVE} out of all of "
            "them to have it judged as COCO"
        )
    return frozenset(found)


def _frequency(path: Path, category: Entry) -> str:
    found = category.get(FREQUENCY)
    if found not in FREQUENCIES:
        raise ValueError(
            f"{path} has {FREQUENCY}={brief(found)} of category {category['id']}, one of {FREQUENCIES} is needed, as "
            f"its images have LVIS's fields: see {FORMAT}, or take {NEGATIVE} and {NOT_EXHAUSTIVE} out of the images "
            "to have it judged as COCO"
        )
    return found
