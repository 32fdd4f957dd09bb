"""Where does the report draw the line that a loss without knowledge has?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pretrain.recipes import load
from pretrain.report.curves import chance_nats
from pretrain.report.record import Record
from tests.fakes import FACTS


def record(recipe: str) -> Record:
    """Of a run that has only begun."""
    return Record(Path(), load(recipe), (), 0, {}, FACTS, {}, {}, {}, None)


def level(recipe: str, name: str) -> float | None:
    """Of a target of a recipe; the batch of the demo has 64 images, its views 8 x 8 patches."""
    found = chance_nats(record(recipe), name)
    return None if found is None else found.value


@pytest.mark.parametrize(("recipe", "target", "nats"), [
    ("m3i.demo", "image_same", 0.5),
    ("m3i.demo", "category", math.log(len(FACTS.categories))),
    ("rows.mim_pixel_demo", "pixels", 0.5),
    ("rows.instance_discrimination_demo", "global", math.log(64)),
    ("rows.dense_instance_discrimination_demo", "dense", math.log(64 * 16)),
    ("rows.instance_decorrelation_demo", "global", 1.0),
])  # fmt: skip
def test_chance_follows_the_likelihood(recipe, target, nats):
    assert level(recipe, target) == pytest.approx(nats)
