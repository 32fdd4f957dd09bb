"""Which things stand where in a scene, and what is true of them? One salient thing, up to three smaller ones.

Colour, ground, place and size are drawn independently of the kind; shape tells the category, and texture hints at
it: a kind has a usual texture, which others share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from data_prep.sources.render import Cutout, Thing, cut_out, visible_mask
from data_prep.sources.shapes import SHAPES
from data_prep.sources.surfaces import BACKGROUNDS, COLORS, TEXTURES

NUM_OBJECTS = (0.2, 0.3, 0.3, 0.2)  # probability of 1, 2, 3, 4 objects
SALIENT_AREA = (0.20, 0.38)  # fraction of the image that the salient silhouette covers
OTHER_AREA = (0.016, 0.05)
MAX_SCALE = 0.47  # half side of a silhouette, in image widths, so that it fits the frame
SIZES = {"small": 0.028, "medium": 0.11, "large": 1.0}  # word -> below which fraction of the image seen
USUAL = 0.65  # probability that a thing bears the texture of its kind, as a zebra its stripes
NUM_TRIES = 12  # to find a place for one more object
LEAST_SEEN = {"salient": 0.88, "other": 0.5}  # fraction of a silhouette that must stay visible
APART = 0.15  # image widths between two centres from which one is "left of" or "above" the other
NEAR = 0.1  # image widths between two boxes up to which they are "next to" each other
HIDDEN = 0.06  # fraction of a silhouette that must be covered to be "behind"


@dataclass(frozen=True)
class Scene:
    """Things from far to near with their silhouettes, and the ground."""

    things: tuple[Thing, ...]
    cutouts: tuple[Cutout, ...]
    salient: int  # index into things
    background: str


@dataclass(frozen=True)
class Seen:
    """What is true of one object of a scene."""

    kind: str
    color: str
    texture: str
    size: str  # of SIZES
    box: tuple[int, int, int, int]  # visible extent x0, y0, x1, y1 in pixels; x1 and y1 are exclusive
    area: float  # visible pixels, fraction of the image
    visible: float  # fraction of its silhouette inside the frame that is not hidden


@dataclass(frozen=True)
class Facts:
    """What is true of a scene: objects (salient first, then by area), who hides whom, and instance numbers."""

    objects: tuple[Seen, ...]
    relations: tuple[tuple[int, str, int], ...]  # (object, "left of" | ..., object)
    background: str
    mask: np.ndarray  # uint8 [size, size], 0 = ground, i + 1 = objects[i]


def arrange(rng: np.random.Generator, kind: str, size: int) -> Scene:
    """A scene whose salient object is of `kind`, on a canvas of `size` pixels."""
    background = _pick(rng, BACKGROUNDS)
    scale = min(MAX_SCALE, _scale(kind, rng.uniform(*SALIENT_AREA)))
    slack = min(0.06, 0.5 - scale)
    x, y = 0.5 + rng.uniform(-slack, slack, 2)
    things = [_thing(rng, kind, x, y, scale)]
    cutouts = [cut_out(things[0], size)]
    salient = 0
    wanted = 1 + int(rng.choice(len(NUM_OBJECTS), p=NUM_OBJECTS))
    others = [other for other in SHAPES if other != kind]
    for other in rng.choice(others, wanted - 1, replace=False).tolist():
        for _ in range(NUM_TRIES):
            scale = _scale(other, rng.uniform(*OTHER_AREA))
            low = min(0.45, 0.75 * scale)
            thing = _thing(rng, other, *rng.uniform(low, 1 - low, 2), scale)
            cutout = cut_out(thing, size)
            at = int(rng.integers(len(things) + 1))
            now_salient = salient + (at <= salient)
            trial = [*cutouts[:at], cutout, *cutouts[at:]]
            if _is_clear(trial, now_salient, size):
                things.insert(at, thing)
                cutouts, salient = trial, now_salient
                break
    return Scene(tuple(things), tuple(cutouts), salient, background)


def observe(scene: Scene, size: int) -> Facts:
    """The facts of a scene, computed from what is visible and nothing else."""
    owner = visible_mask(list(scene.cutouts), size)
    pixels = np.bincount(owner.ravel(), minlength=len(scene.things) + 1)[1:]
    order = sorted(range(len(scene.things)), key=lambda i: (i != scene.salient, -pixels[i], i))
    shapes = [cutout.on_canvas(size) for cutout in scene.cutouts]
    numbers = np.zeros(len(order) + 1, np.uint8)
    numbers[[i + 1 for i in order]] = np.arange(1, len(order) + 1)
    seen = []
    for i in order:
        rows, columns = np.nonzero((owner == i + 1).any(1))[0], np.nonzero((owner == i + 1).any(0))[0]
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        area = float(pixels[i]) / size**2
        word = next(word for word, limit in SIZES.items() if area < limit)
        thing = scene.things[i]
        visible = float(pixels[i] / shapes[i].sum())
        seen.append(Seen(thing.kind, thing.color, thing.texture, word, box, area, visible))
    hides = {
        (order.index(far), order.index(near))
        for near in range(len(order))
        for far in range(near)
        if (shapes[near] & shapes[far]).sum() >= HIDDEN * shapes[far].sum()
    }
    return Facts(tuple(seen), _relations(seen, hides, size), scene.background, numbers[owner])


def _relations(seen: list[Seen], hides: set[tuple[int, int]], size: int) -> tuple[tuple[int, str, int], ...]:
    found = []
    for i, first in enumerate(seen):
        for j, second in enumerate(seen):
            if i == j:
                continue
            a, b = np.array(first.box) / size, np.array(second.box) / size
            dx, dy = (b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2
            if dx >= APART and abs(dx) >= abs(dy):
                found += [(i, "left of", j), (j, "right of", i)]
            if dy >= APART and abs(dy) >= abs(dx):
                found += [(i, "above", j), (j, "below", i)]
            if (i, j) in hides:
                found += [(i, "behind", j), (j, "in front of", i)]
            gap = max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])
            if 0 <= gap <= NEAR:
                found.append((i, "next to", j))
    return tuple(sorted(found))


def _is_clear(cutouts: list[Cutout], salient: int, size: int) -> bool:
    """Whether every object stays recognisable: inside the frame and hardly hidden."""
    owner = visible_mask(cutouts, size)
    for i, cutout in enumerate(cutouts):
        whole = float((cutout.cover >= 0.5).sum())
        least = LEAST_SEEN["salient" if i == salient else "other"]
        if (owner == i + 1).sum() < least * whole:
            return False
    return True


def _thing(rng: np.random.Generator, kind: str, x: float, y: float, scale: float) -> Thing:
    angle = float(np.clip(rng.normal(0, 8), -20, 20))
    color, texture = _pick(rng, COLORS), _pick(rng, TEXTURES)
    if rng.random() < USUAL:
        texture = usual_texture(kind)
    return Thing(kind, color, texture, float(x), float(y), float(scale), angle, bool(rng.random() < 0.5))


def usual_texture(kind: str) -> str:
    """The texture that most things of a kind bear; every texture is usual for equally many kinds."""
    textures = list(TEXTURES)
    return textures[list(SHAPES).index(kind) % len(textures)]


def _pick(rng: np.random.Generator, table: dict) -> str:
    return list(table)[int(rng.integers(len(table)))]


def _scale(kind: str, area: float) -> float:
    """Half the side, in image widths, at which a silhouette covers `area` of the image."""
    return float(np.sqrt(area / _unit_area(kind)))


@cache
def _unit_area(kind: str) -> float:
    """Area of a silhouette with half side 1, in square units."""
    canvas = 128
    cutout = cut_out(Thing(kind, "red", "plain", 0.5, 0.5, 0.25, 0.0, False), canvas)
    return float(cutout.cover.sum()) / canvas**2 / 0.25**2
