"""Which data and which runs do the tests of transfer share?"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.facts import DataFacts
from pretrain.recipes import load
from tests.evaluate.runs import write_run
from tests.evaluate.sets import COLORS, write_set
from tests.fakes import shrink

FAMILIES = {"internimage": "m3i.internimage_h", "swin": "hvp.swin_b", "vit": "m3i.vit_b16"}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of train/ (8 images with masks) and heldout/ (4)."""
    folder = tmp_path_factory.mktemp("shards")
    write_set(folder / "train", "train", 2, text=False)
    write_set(folder / "heldout", "heldout", 1, text=False, seed=1)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family of backbones a run with one checkpoint."""
    facts = DataFacts(categories=tuple(COLORS), vocab_size=100, tags=("round", "square"))
    folder = tmp_path_factory.mktemp("runs")
    return {
        family: write_run(folder / family, shrink(load(recipe)), facts, steps=(0,))
        for family, recipe in FAMILIES.items()
    }


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """ROOT with images/ and annotations/instances_{train,val}.json: images 1 to 4, and 5 to 8, with a square."""
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for split, numbers in (("train", range(1, 5)), ("val", range(5, 9))):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(_squares(tmp_path / "images", numbers))
        )
    return tmp_path


def _squares(folder: Path, numbers: Iterable[int]) -> dict[str, Any]:
    images, things = [], []
    for number in numbers:
        left, size = 4 * number, 16
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[8 : 8 + size, left : left + size, number % 2] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
        right = left + size
        things.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 10 * (1 + number % 2),
                "bbox": [left, 8, size, size],
                "area": size * size,
                "iscrowd": 0,
                "segmentation": [[left, 8, right, 8, right, 8 + size, left, 8 + size]],
            }
        )
    return {
        "images": images,
        "annotations": things,
        "categories": [{"id": 10, "name": "red"}, {"id": 20, "name": "green"}],
    }
