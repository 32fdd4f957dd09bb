"""What is the embedded data set? Photograph-like scenes drawn from a seed, with nothing to download or license."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from data_prep.samples import Collection, Made, Sample
from data_prep.sources.grammar import captions
from data_prep.sources.layout import Facts, arrange, observe
from data_prep.sources.render import render
from data_prep.sources.shapes import SHAPES

VERSION = 1  # raise it when the pictures or captions of a seed change
JPEG_QUALITY = 90
NUM_CAPTIONS = 3  # a scene
SMALLEST = 32  # pixels
CATEGORIES = tuple(SHAPES)


@dataclass(frozen=True)
class Scenes:
    """Draw scenes of 1 to 4 objects; their category is the kind of the salient one."""

    count: int = 8000  # scenes in all splits together
    seed: int = 0  # same seed, same bytes
    heldout: float = 0.125  # fraction of the scenes that goes into the split `heldout`, in [0, 1)
    size: int = 96  # pixels, side of the image

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1 scene: pass --count 8000")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative: pass --seed 0")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout={self.heldout} must lie in [0, 1): pass --heldout 0.125")
        if self.size < SMALLEST:
            raise ValueError(f"size={self.size} must be at least {SMALLEST} pixels: pass --size 96")
        if round(self.count * self.heldout) == self.count:
            raise ValueError(
                f"heldout={self.heldout} leaves none of {self.count} scenes to train on: lower it"
            )

    def collections(self) -> list[Collection]:
        """The training split, then the held-out one (the last scenes of the sequence) when it has any."""
        num_heldout = round(self.count * self.heldout)
        num_train = self.count - num_heldout
        ranges = {"train": range(num_train), "heldout": range(num_train, self.count)}
        return [self._collection(split, indices) for split, indices in ranges.items() if indices]

    def _collection(self, split: str, indices: range) -> Collection:
        settings: dict[str, Any] = {
            "source": "scenes",
            "version": VERSION,
            "count": self.count,
            "seed": self.seed,
            "heldout": self.heldout,
            "size": self.size,
        }
        num_bytes = len(indices) * (8 * 1024 + self.size * self.size // 2)
        make = partial(make_scene, seed=self.seed, size=self.size)
        return Collection(
            "scenes", split, True, CATEGORIES, settings, indices, make, num_bytes, tags=CATEGORIES
        )


def draw_scene(index: int, seed: int, size: int) -> tuple[np.ndarray, Facts, tuple[str, ...]]:
    """Scene `index` of a seed: picture uint8 [size, size, 3], its facts and captions; depends on nothing else.

    Every block of len(CATEGORIES) scenes holds every category once, in a seeded order.
    """
    block, place = divmod(index, len(CATEGORIES))
    kind = CATEGORIES[np.random.default_rng((seed, 1, block)).permutation(len(CATEGORIES))[place]]
    rng = np.random.default_rng((seed, 0, index))
    scene = arrange(rng, kind, size)
    facts = observe(scene, size)
    picture = render(rng, list(scene.things), list(scene.cutouts), scene.background, size)
    return picture, facts, captions(rng, facts, NUM_CAPTIONS)


def make_scene(index: int, *, seed: int, size: int) -> Made:
    """Scene `index` as a sample: JPEG, captions, category, tags, boxes and instance mask."""
    picture, facts, told = draw_scene(index, seed, size)
    image, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(picture).save(image, "JPEG", quality=JPEG_QUALITY)
    Image.fromarray(facts.mask).save(mask, "PNG")
    largest = facts.objects[0].area
    record = {
        "source": "scenes",
        "index": index,
        "category": facts.objects[0].kind,
        "background": facts.background,
        "tags": [
            [seen.kind, round(seen.visible * min(1.0, seen.area / largest) ** 0.5, 3)]
            for seen in facts.objects
        ],
        "objects": [
            {
                "name": seen.kind,
                "shape": seen.kind,
                "color": seen.color,
                "texture": seen.texture,
                "size": seen.size,
                "box": list(seen.box),
                "area": round(seen.area, 4),
                "visible": round(seen.visible, 4),
            }
            for seen in facts.objects
        ],
        "relations": [list(relation) for relation in facts.relations],
    }
    sample = Sample(
        key=f"scenes-{index:08d}",
        image=image.getvalue(),
        extension="jpg",
        size=(size, size),
        captions=told,
        category=CATEGORIES.index(facts.objects[0].kind),
        mask=mask.getvalue(),
        record=record,
    )
    return Made(sample)
