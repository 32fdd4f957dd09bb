"""What do the things and the ground of a scene look like? Colours, object textures and backgrounds from noise.

Pictures are float32 [h, w, 3] in [0, 1]; fields are float32 [h, w]. Everything is a function of a generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.14, 0.14),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.20, 0.72, 0.25),
    "teal": (0.10, 0.70, 0.68),
    "blue": (0.25, 0.44, 0.96),
    "purple": (0.64, 0.30, 0.84),
    "pink": (0.95, 0.50, 0.68),
    "white": (0.95, 0.95, 0.93),
    "gray": (0.60, 0.60, 0.62),
}


def smooth_noise(
    rng: np.random.Generator, height: int, width: int, rows: float, columns: float
) -> np.ndarray:
    """A field of mean about 0.5 in [0, 1] with `rows` x `columns` random bumps, bicubic in between."""
    shape = (max(2, round(rows)), max(2, round(columns)))
    bumps = Image.fromarray(rng.random(shape, dtype=np.float32))
    return np.clip(np.asarray(bumps.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)


def fractal_noise(rng: np.random.Generator, size: int, cells: float, octaves: int = 4) -> np.ndarray:
    """Smooth noise summed over octaves, each twice as fine and half as strong; [size, size], mean about 0.5."""
    total = np.zeros((size, size), np.float32)
    weight = 0.5
    for octave in range(octaves):
        fine = cells * 2**octave
        total += weight * smooth_noise(rng, size, size, min(fine, size), min(fine, size))
        weight /= 2
    return total / (1 - 0.5**octaves)


def coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    """y and x of the pixel centres, [size, 1] and [1, size], in [0, 1]."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[:, None], line[None, :]


def _wave(phase: np.ndarray, sharpness: float = 4.0) -> np.ndarray:
    return np.clip(0.5 + sharpness * np.sin(phase), 0, 1).astype(np.float32)


def _shade(base: np.ndarray, field: np.ndarray, strength: float) -> np.ndarray:
    return base * (1 + strength * (field - 0.5))[..., None]


def _mix(first: np.ndarray, second: np.ndarray, field: np.ndarray) -> np.ndarray:
    return first + (second - first) * field[..., None]


def _turned(rng: np.random.Generator, size: int) -> np.ndarray:
    """A coordinate along a random direction, in image widths."""
    y, x = coordinates(size)
    angle = rng.uniform(0, np.pi)
    return x * math.cos(angle) + y * math.sin(angle)


# --- textures of objects: (generator, colour [3], size, scale) -> picture; scale = object side in image widths


def _plain(rng: np.random.Generator, color: np.ndarray, size: int, scale: float) -> np.ndarray:
    return _shade(np.broadcast_to(color, (size, size, 3)), fractal_noise(rng, size, 4, 2), 0.25)


def _striped(rng: np.random.Generator, color: np.ndarray, size: int, scale: float) -> np.ndarray:
    phase = _turned(rng, size) * 2 * np.pi * rng.uniform(3.5, 5) / scale
    return _mix(color, _second(rng, color), _wave(phase, 3) * 0.9)


def _dotted(rng: np.random.Generator, color: np.ndarray, size: int, scale: float) -> np.ndarray:
    y, x = coordinates(size)
    pitch = 2 * np.pi * rng.uniform(3.5, 5) / scale
    angle = rng.uniform(0, np.pi)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    bumps = np.cos(u * pitch) + np.cos(v * pitch)
    return _mix(color, _second(rng, color), np.clip(2.5 * (bumps - 0.75), 0, 1))


def _checked(rng: np.random.Generator, color: np.ndarray, size: int, scale: float) -> np.ndarray:
    y, x = coordinates(size)
    pitch = 2 * np.pi * rng.uniform(2, 3) / scale
    angle = rng.uniform(0, np.pi)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return _mix(color, _second(rng, color), np.clip(0.5 + 4 * np.sin(u * pitch) * np.sin(v * pitch), 0, 1))


def _shaded(rng: np.random.Generator, color: np.ndarray, size: int, scale: float) -> np.ndarray:
    line = _turned(rng, size)
    ramp = np.clip((line - line.mean()) / scale + 0.5, 0, 1)
    return _mix(color * 0.45, np.minimum(color * 1.15 + 0.22, 1), ramp)


def _speckled(rng: np.random.Generator, color: np.ndarray, size: int, scale: float) -> np.ndarray:
    grain = np.clip(4 * (smooth_noise(rng, size, size, size / 2.2, size / 2.2) - 0.62), 0, 1)
    return _mix(color, _second(rng, color), grain)


def _second(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """A lighter or darker companion of a colour, so that the colour's name stays true."""
    is_light = color.mean() > 0.55
    return color * rng.uniform(0.5, 0.7) if is_light else color + (1 - color) * rng.uniform(0.6, 0.8)


TEXTURES: dict[str, Callable[..., np.ndarray]] = {
    "plain": _plain,
    "striped": _striped,
    "dotted": _dotted,
    "checked": _checked,
    "shaded": _shaded,
    "speckled": _speckled,
}


# --- backgrounds: (generator, size) -> picture


def _earthy(rng: np.random.Generator, *colors: tuple[float, float, float]) -> np.ndarray:
    """A random mixture of the named colours, a little lighter or darker."""
    weights = rng.dirichlet(np.ones(len(colors)))
    return (weights @ np.array(colors) * rng.uniform(0.75, 1.2)).astype(np.float32)


def _wood(rng: np.random.Generator, size: int) -> np.ndarray:
    base = _earthy(rng, (0.55, 0.36, 0.20), (0.72, 0.55, 0.36), (0.36, 0.22, 0.14), (0.62, 0.60, 0.56))
    grain = 0.6 * smooth_noise(rng, size, size, size / 2, size / 14) + 0.4 * smooth_noise(
        rng, size, size, 14, 3
    )
    picture = _shade(np.broadcast_to(base, (size, size, 3)), grain, 0.9)
    num_planks = int(rng.integers(3, 7))
    y, _ = coordinates(size)
    row = (y * num_planks + rng.uniform(0, 1)) % 1
    tone = rng.uniform(0.85, 1.15, num_planks + 2).astype(np.float32)[(y * num_planks).astype(int)]
    picture = picture * (tone * (1 - 0.55 * (row < 0.06 * num_planks / 4)))[..., None]
    return picture if rng.random() < 0.5 else picture.transpose(1, 0, 2)


def _grass(rng: np.random.Generator, size: int) -> np.ndarray:
    base = _earthy(rng, (0.22, 0.42, 0.12), (0.45, 0.52, 0.20), (0.15, 0.30, 0.14), (0.55, 0.50, 0.28))
    blades = smooth_noise(rng, size, size, size / 7, size / 1.6)
    picture = _shade(np.broadcast_to(base, (size, size, 3)), blades, 1.3)
    return _shade(picture, fractal_noise(rng, size, 3, 3), 0.9)


def _sand(rng: np.random.Generator, size: int) -> np.ndarray:
    base = _earthy(rng, (0.82, 0.70, 0.50), (0.70, 0.58, 0.44), (0.86, 0.80, 0.70))
    warp = fractal_noise(rng, size, 3, 3)
    ripples = 0.5 + 0.5 * np.sin(2 * np.pi * (_turned(rng, size) * rng.uniform(5, 10) + 2.5 * warp))
    picture = _shade(
        np.broadcast_to(base, (size, size, 3)), ripples.astype(np.float32), rng.uniform(0.1, 0.35)
    )
    return _shade(picture, rng.random((size, size), dtype=np.float32), 0.3)


def _brick(rng: np.random.Generator, size: int) -> np.ndarray:
    base = _earthy(rng, (0.60, 0.28, 0.20), (0.70, 0.45, 0.33), (0.55, 0.52, 0.50), (0.78, 0.74, 0.68))
    num_rows = int(rng.integers(5, 9))
    y, x = coordinates(size)
    row = np.floor(y * num_rows).astype(int)
    across = x * num_rows / 2 + 0.5 * (row % 2)
    column = np.floor(across).astype(int)
    tone = rng.uniform(0.75, 1.2, (num_rows + 1, num_rows + 2)).astype(np.float32)[row, column]
    gap = np.minimum((y * num_rows) % 1, 1 - (y * num_rows) % 1) * 1.0
    side = np.minimum(across % 1, 1 - across % 1) * 2.0
    mortar = np.clip(1.6 - np.minimum(gap, side) / 0.05, 0, 1)
    picture = _shade(base * tone[..., None], fractal_noise(rng, size, 16, 3), 0.6)
    return _mix(picture, np.float32(rng.uniform(0.45, 0.8)) * np.ones(3, np.float32), mortar)


def _fabric(rng: np.random.Generator, size: int) -> np.ndarray:
    base = _earthy(rng, *COLORS.values())
    y, x = coordinates(size)
    threads = rng.uniform(18, 30)
    weave = 0.5 + 0.25 * (np.sin(2 * np.pi * threads * x) + np.sin(2 * np.pi * threads * y))
    picture = _shade(np.broadcast_to(base, (size, size, 3)), weave.astype(np.float32), 0.5)
    if rng.random() < 0.6:
        band = _wave(2 * np.pi * x * rng.uniform(2, 5)) + _wave(2 * np.pi * y * rng.uniform(2, 5))
        picture = _mix(picture, _earthy(rng, *COLORS.values()), 0.35 * band)
    folds = fractal_noise(rng, size, 2, 2)
    return _shade(picture, folds, 0.9)


def _stone(rng: np.random.Generator, size: int) -> np.ndarray:
    base = _earthy(rng, (0.60, 0.60, 0.58), (0.40, 0.38, 0.36), (0.70, 0.64, 0.56), (0.35, 0.40, 0.46))
    veins = 1 - np.abs(2 * fractal_noise(rng, size, 3, 4) - 1) * 3
    picture = _shade(np.broadcast_to(base, (size, size, 3)), fractal_noise(rng, size, 8, 4), 1.0)
    return _shade(picture, np.clip(veins, 0, 1), float(rng.choice([-0.6, 0.4])))


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    base = _earthy(rng, (0.12, 0.32, 0.50), (0.20, 0.50, 0.55), (0.30, 0.40, 0.42), (0.10, 0.22, 0.30))
    ripples = 0.6 * smooth_noise(rng, size, size, size / 3, size / 12)
    ripples = ripples + 0.4 * smooth_noise(rng, size, size, size / 8, size / 24)
    picture = _shade(np.broadcast_to(base, (size, size, 3)), ripples, 1.3)
    return picture + 0.35 * np.clip((ripples - 0.66) * 6, 0, 1)[..., None]


def _wall(rng: np.random.Generator, size: int) -> np.ndarray:
    base = 0.35 * _earthy(rng, *COLORS.values()) + 0.65 * _earthy(rng, (0.80, 0.78, 0.72), (0.55, 0.6, 0.66))
    picture = _shade(np.broadcast_to(base, (size, size, 3)), fractal_noise(rng, size, 3, 5), 0.6)
    return _shade(picture, rng.random((size, size), dtype=np.float32), 0.12)


BACKGROUNDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "wood": _wood,
    "grass": _grass,
    "sand": _sand,
    "brick": _brick,
    "fabric": _fabric,
    "stone": _stone,
    "water": _water,
    "plaster": _wall,
}
