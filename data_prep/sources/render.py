"""How does a layout of things become a photograph-like picture? Ground, clutter, shadows, relief, light and a camera.

Lengths are in image widths, angles in degrees, pictures float32 [h, w, 3] in [0, 1] until the camera makes uint8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_prep.sources.shapes import ADD, CUT, MARK, SHAPES, Part
from data_prep.sources.surfaces import BACKGROUNDS, COLORS, TEXTURES, coordinates, smooth_noise

GROUND_LIGHT = (0.3, 0.5)  # the ground lies in the shade, things catch the light and stand out from it
SUPERSAMPLING = 4  # silhouettes are drawn that many times larger and averaged down


@dataclass(frozen=True)
class Thing:
    """One object of a scene and where it stands."""

    kind: str  # of SHAPES
    color: str  # of COLORS
    texture: str  # of TEXTURES
    x: float  # centre, in image widths
    y: float
    scale: float  # half the side of the unit square of the shape, in image widths
    angle: float  # degrees, clockwise
    is_mirrored: bool


@dataclass(frozen=True)
class Cutout:
    """A silhouette in a window of the canvas: how much of each pixel it covers, where details darken it.

    The window leaves room for the shadow around the silhouette and may reach over the edges of the canvas.
    """

    top: int  # pixels; first row of the window
    left: int
    cover: np.ndarray  # float32 [h, w] in [0, 1]
    detail: np.ndarray  # float32 [h, w] in [0, 1]

    def inside(self, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The part of the window that lies on a canvas of `size` pixels: (rows, columns) there and in the window."""
        height, width = self.cover.shape
        top, left = max(0, self.top), max(0, self.left)
        bottom, right = max(top, min(size, self.top + height)), max(left, min(size, self.left + width))
        canvas = slice(top, bottom), slice(left, right)
        window = slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left)
        return canvas, window

    def on_canvas(self, size: int) -> np.ndarray:
        """Where the silhouette lies, bool [size, size]: pixels covered at least by half."""
        canvas, window = self.inside(size)
        where = np.zeros((size, size), bool)
        where[canvas] = self.cover[window] >= 0.5
        return where


def cut_out(thing: Thing, size: int) -> Cutout:
    """The silhouette of a thing on a canvas of `size` pixels, antialiased."""
    return _draw(SHAPES[thing.kind], thing, size)


def _draw(parts: tuple[Part, ...], thing: Thing, size: int) -> Cutout:
    turn = np.radians(thing.angle)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    flip = (-1, 1) if thing.is_mirrored else (1, 1)
    placed = [((points * flip) @ rotation * thing.scale + (thing.x, thing.y)) * size for _, points in parts]
    corners = np.concatenate(placed)
    margin = 2 + 0.8 * thing.scale * size  # room for the shadow
    left, top = np.floor(corners.min(0) - margin).astype(int).tolist()
    width, height = np.ceil(corners.max(0) + margin).astype(int) - (left, top)
    shape = (int(width) * SUPERSAMPLING, int(height) * SUPERSAMPLING)
    cover, detail = Image.new("L", shape), Image.new("L", shape)
    brushes = {
        ADD: (ImageDraw.Draw(cover), 255),
        CUT: (ImageDraw.Draw(cover), 0),
        MARK: (ImageDraw.Draw(detail), 255),
    }
    for (role, _), points in zip(parts, placed, strict=True):
        brush, value = brushes[role]
        brush.polygon(((points - (left, top)) * SUPERSAMPLING).ravel().tolist(), fill=value)
    return Cutout(top, left, _field(cover.reduce(SUPERSAMPLING)), _field(detail.reduce(SUPERSAMPLING)))


def _field(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


def _blurred(field: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray((np.clip(field, 0, 1) * 255).astype(np.uint8))
    return _field(image.filter(ImageFilter.GaussianBlur(radius)))


def _shifted(field: np.ndarray, step: np.ndarray) -> np.ndarray:
    return np.roll(field, (round(float(step[1])), round(float(step[0]))), axis=(0, 1))


def render(
    rng: np.random.Generator, things: list[Thing], cutouts: list[Cutout], background: str, size: int
) -> np.ndarray:
    """The picture of a scene, uint8 [size, size, 3].

    `things` stand from far to near, each with its cutout; a later one hides an earlier one.
    """
    sun = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(sun), np.sin(sun)])  # from where the light comes, in the image plane
    picture = np.clip(BACKGROUNDS[background](rng, size).astype(np.float32), 0.02, 1)
    _clutter(rng, picture, light, size)
    picture = _defocused(picture, rng.uniform(0, 0.011) * size) * rng.uniform(*GROUND_LIGHT)
    for thing, cutout in zip(things, cutouts, strict=True):
        color = np.clip(np.array(COLORS[thing.color]) * rng.uniform(0.9, 1.1, 3), 0, 1).astype(np.float32)
        skin = TEXTURES[thing.texture](rng, color, size, 2 * thing.scale)
        _paste(rng, picture, skin, cutout, light, thing.scale)
    return _photograph(rng, picture, light, size)


def visible_mask(cutouts: list[Cutout], size: int) -> np.ndarray:
    """Which thing is seen at each pixel, uint8 [size, size]: 0 = none, i + 1 = cutouts[i]; later hide earlier."""
    owner = np.zeros((size, size), np.uint8)
    for number, cutout in enumerate(cutouts, start=1):
        owner[cutout.on_canvas(size)] = number
    return owner


def _paste(
    rng: np.random.Generator,
    picture: np.ndarray,
    skin: np.ndarray,
    cutout: Cutout,
    light: np.ndarray,
    scale: float,
) -> None:
    """Lay one object over the picture: a soft shadow away from the light, relief at its edges, a highlight."""
    size = len(picture)
    reach = scale * size * rng.uniform(0.12, 0.3)
    gloss, darkness = rng.uniform(0, 1.1), rng.uniform(0.35, 0.65)
    canvas, window = cutout.inside(size)
    shadow = _blurred(_shifted(cutout.cover, -light * reach), 0.8 + 0.35 * reach) * darkness
    bulge = _blurred(cutout.cover, max(1.0, 0.2 * scale * size))
    step = light * max(1.0, 0.1 * scale * size)
    slope = _shifted(bulge, step) - _shifted(bulge, -step)
    relief = (0.78 - 0.75 * slope + 0.22 * bulge) * (1 - 0.62 * cutout.detail)
    shine = gloss * np.clip(-slope - 0.22, 0, 1)
    lit = np.clip(skin[canvas] * relief[window][..., None] + shine[window][..., None], 0, 1)
    ground = picture[canvas] * (1 - shadow)[window][..., None]
    picture[canvas] = ground + (lit - ground) * cutout.cover[window][..., None]


def _clutter(rng: np.random.Generator, picture: np.ndarray, light: np.ndarray, size: int) -> None:
    """Pebbles, sticks and scraps without a name, strewn over the ground; drawn in one go."""
    colors, ground = np.array(list(COLORS.values())), picture.mean((0, 1))
    side = size * SUPERSAMPLING
    cover, skin = Image.new("L", (side, side)), Image.new("RGB", (size, size))
    draw_cover, draw_skin = ImageDraw.Draw(cover), ImageDraw.Draw(skin)
    for _ in range(int(rng.integers(2, 10))):
        num_corners = int(rng.integers(4, 9))
        turn, tilt = np.sort(rng.uniform(0, 2 * np.pi, num_corners)), rng.uniform(0, np.pi)
        radius = rng.uniform(0.5, 1, num_corners) * rng.uniform(0.015, 0.07)
        x, y = np.cos(turn) * radius, np.sin(turn) * radius * rng.uniform(0.15, 0.9)
        turned = np.stack([x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)], axis=1)
        corners = turned + rng.uniform(0, 1, 2)
        color = 0.5 * colors[rng.integers(len(colors))] * rng.uniform(0.4, 1) + 0.5 * ground
        fill = tuple((np.clip(color, 0, 1) * 255).astype(int).tolist())
        draw_cover.polygon((corners * side).ravel().tolist(), fill=255)
        draw_skin.polygon((corners * size).ravel().tolist(), fill=fill, outline=fill, width=2)
    cutout = Cutout(0, 0, _field(cover.reduce(SUPERSAMPLING)), np.zeros((size, size), np.float32))
    _paste(rng, picture, _field(skin), cutout, light, 0.04)


def _defocused(picture: np.ndarray, radius: float) -> np.ndarray:
    if radius < 0.3:
        return picture
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return _field(image.filter(ImageFilter.GaussianBlur(radius)))


def _photograph(rng: np.random.Generator, picture: np.ndarray, light: np.ndarray, size: int) -> np.ndarray:
    """What a small camera records: uneven light, tint, vignette, exposure, lens blur, shot and read noise; uint8."""
    y, x = coordinates(size)
    slope = rng.uniform(0.1, 0.75)
    lamp = 1 + slope * ((x - 0.5) * float(light[0]) + (y - 0.5) * float(light[1]))
    lamp = lamp * (1 - rng.uniform(0, 0.55) * ((x - 0.5) ** 2 + (y - 0.5) ** 2))
    if rng.random() < 0.35:  # the shade of something outside the picture
        blinds = np.clip((smooth_noise(rng, size, size, 3, 3) - 0.5) * 6, 0, 1)
        lamp = lamp * (1 - rng.uniform(0.15, 0.4) * blinds)
    tint = 1 + rng.uniform(-0.07, 0.07) * np.array([1, 0.1, -1], np.float32)
    picture = picture * lamp[..., None] * tint * rng.uniform(0.8, 1.15)
    picture = _defocused(np.clip(picture, 0, 1), rng.uniform(0, 0.007) * size)
    noise = rng.standard_normal(picture.shape, dtype=np.float32)
    picture = picture + noise * (
        rng.uniform(0.004, 0.02) + rng.uniform(0, 0.03) * np.sqrt(np.clip(picture, 0, 1))
    )
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
