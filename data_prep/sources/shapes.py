"""Which silhouettes can a scene hold? One row a kind, as polygons in a unit square.

A silhouette is a tuple of parts (role, points): points are float64 [n, 2] in [-1, 1], x to the right, y down; the
roles are drawn in order: ADD fills, CUT makes a hole, MARK darkens a detail inside (an eye, a door).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

ADD, CUT, MARK = "add", "cut", "mark"
Role = Literal["add", "cut", "mark"]
Part = tuple[Role, np.ndarray]


def polygon(*points: tuple[float, float]) -> np.ndarray:
    """The points as an array [n, 2]."""
    return np.array(points, dtype=np.float64)


def rectangle(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """The four corners of an upright rectangle."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(
    x: float, y: float, rx: float, ry: float | None = None, start: float = 0, stop: float = 360
) -> np.ndarray:
    """An ellipse, or its part between two angles in degrees (clockwise from the right, as y points down)."""
    turn = np.radians(np.linspace(start, stop, 37))
    return np.stack([x + rx * np.cos(turn), y + (ry or rx) * np.sin(turn)], axis=1)


def _mirrored(points: np.ndarray) -> np.ndarray:
    return points * (-1, 1)


def _radial(radii: list[float], start: float = -90) -> np.ndarray:
    turn = np.radians(start + np.arange(len(radii)) * 360 / len(radii))
    return np.stack([np.cos(turn), np.sin(turn)], axis=1) * np.array(radii)[:, None]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1) / 17


def _both(role: Role, points: np.ndarray) -> tuple[Part, Part]:
    return (role, points), (role, _mirrored(points))


SHAPES: dict[str, tuple[Part, ...]] = {
    "star": ((ADD, _radial([1, 0.43] * 5)),),
    "heart": ((ADD, _heart()),),
    "ring": ((ADD, ellipse(0, 0, 0.95)), (CUT, ellipse(0, 0, 0.5))),
    "cross": ((ADD, rectangle(-0.33, -0.95, 0.33, 0.95)), (ADD, rectangle(-0.95, -0.33, 0.95, 0.33))),
    "arrow": (
        (ADD, rectangle(-1, -0.28, 0.2, 0.28)),
        (ADD, polygon((0.1, -0.78), (1, 0), (0.1, 0.78))),
    ),
    "crescent": ((ADD, ellipse(0, 0, 1)), (CUT, ellipse(0.5, -0.1, 0.78))),
    "house": (
        (ADD, rectangle(-0.72, -0.1, 0.72, 0.95)),
        (ADD, polygon((-1, -0.05), (0, -1), (1, -0.05))),
        (ADD, rectangle(0.42, -0.95, 0.68, -0.3)),
        (MARK, rectangle(-0.18, 0.35, 0.18, 0.95)),
        *_both(MARK, rectangle(0.34, 0.15, 0.58, 0.42)),
    ),
    "tree": (
        (ADD, rectangle(-0.17, 0.5, 0.17, 1)),
        (ADD, polygon((-0.85, 0.62), (0, -0.2), (0.85, 0.62))),
        (ADD, polygon((-0.68, 0.14), (0, -0.6), (0.68, 0.14))),
        (ADD, polygon((-0.5, -0.32), (0, -1), (0.5, -0.32))),
        (MARK, rectangle(-0.17, 0.64, 0.17, 1)),
    ),
    "fish": (
        (ADD, ellipse(0.2, 0, 0.78, 0.5)),
        (ADD, polygon((-0.35, 0), (-1, -0.58), (-0.82, 0), (-1, 0.58))),
        (ADD, polygon((-0.15, -0.4), (0.1, -0.8), (0.5, -0.42))),
        (MARK, ellipse(0.62, -0.13, 0.09)),
        (MARK, polygon((0.3, -0.33), (0.38, 0), (0.3, 0.33), (0.27, 0))),
    ),
    "mug": (
        (ADD, ellipse(0.5, 0.1, 0.48)),
        (CUT, ellipse(0.5, 0.1, 0.25)),
        (ADD, rectangle(-0.85, -0.75, 0.45, 0.85)),
        (ADD, ellipse(-0.2, 0.83, 0.65, 0.12)),
        (ADD, ellipse(-0.2, -0.75, 0.65, 0.18)),
        (MARK, ellipse(-0.2, -0.74, 0.54, 0.11)),
    ),
    "key": (
        (ADD, ellipse(-0.5, 0, 0.5)),
        (CUT, ellipse(-0.56, 0, 0.22)),
        (ADD, rectangle(-0.1, -0.2, 1, 0.2)),
        (ADD, rectangle(0.36, 0.1, 0.62, 0.6)),
        (ADD, rectangle(0.74, 0.1, 1, 0.5)),
    ),
    "mushroom": (
        (ADD, polygon((-0.3, 0), (0.3, 0), (0.4, 0.9), (0.15, 1), (-0.15, 1), (-0.4, 0.9))),
        (ADD, ellipse(0, 0.1, 1, 1, 180, 360)),
        (MARK, ellipse(-0.42, -0.25, 0.17)),
        (MARK, ellipse(0.1, -0.52, 0.15)),
        (MARK, ellipse(0.5, -0.16, 0.14)),
    ),
    "bolt": (
        (
            ADD,
            polygon(
                (-0.2, -1), (0.62, -1), (0.3, -0.32), (0.78, -0.32), (-0.42, 1), (-0.12, 0.2), (-0.7, 0.2)
            ),
        ),
    ),
    "bottle": (
        (ADD, rectangle(-0.46, -0.1, 0.46, 1)),
        (ADD, ellipse(0, -0.1, 0.46, 0.34, 180, 360)),
        (ADD, rectangle(-0.19, -0.8, 0.19, 0)),
        (ADD, rectangle(-0.26, -1, 0.26, -0.8)),
        (MARK, rectangle(-0.46, 0.2, 0.46, 0.62)),
    ),
    "umbrella": (
        (ADD, ellipse(0, 0.1, 1, 1, 180, 360)),
        *_both(CUT, ellipse(0.67, 0.14, 0.3, 0.17)),
        (CUT, ellipse(0, 0.14, 0.32, 0.17)),
        (ADD, rectangle(-0.08, -0.1, 0.08, 0.85)),
        (ADD, ellipse(0.16, 0.76, 0.24, 0.24, 0, 180)),
        (CUT, ellipse(0.17, 0.74, 0.09, 0.1)),
    ),
    "butterfly": (
        *_both(ADD, ellipse(0.52, -0.4, 0.48, 0.46)),
        *_both(ADD, ellipse(0.42, 0.45, 0.36, 0.4)),
        (ADD, ellipse(0, 0, 0.13, 0.75)),
        (MARK, ellipse(0, 0, 0.11, 0.72)),
        *_both(MARK, ellipse(0.58, -0.42, 0.17)),
    ),
    "cloud": (
        (ADD, ellipse(-0.58, 0.2, 0.4)),
        (ADD, ellipse(-0.1, -0.15, 0.52)),
        (ADD, ellipse(0.5, 0.12, 0.48)),
        (ADD, rectangle(-0.58, 0.1, 0.5, 0.6)),
    ),
    "boat": (
        (ADD, polygon((-1, 0.35), (1, 0.35), (0.62, 0.95), (-0.62, 0.95))),
        (ADD, rectangle(-0.07, -0.95, 0.05, 0.4)),
        (ADD, polygon((0.1, -1), (0.1, 0.24), (0.92, 0.24))),
        (ADD, polygon((-0.12, -0.75), (-0.12, 0.24), (-0.78, 0.24))),
    ),
    "gear": ((ADD, _radial([0.72, 0.98, 0.98, 0.72] * 8)), (CUT, ellipse(0, 0, 0.27))),
    "flower": (
        *((ADD, ellipse(x, y, 0.37)) for x, y in _radial([0.62] * 6)),
        (ADD, ellipse(0, 0, 0.4)),
        (MARK, ellipse(0, 0, 0.27)),
    ),
    "hourglass": (
        (ADD, polygon((-0.68, -0.9), (0.68, -0.9), (0.12, 0), (0.68, 0.9), (-0.68, 0.9), (-0.12, 0))),
        (ADD, rectangle(-0.85, -1, 0.85, -0.76)),
        (ADD, rectangle(-0.85, 0.76, 0.85, 1)),
        (MARK, polygon((-0.4, 0.72), (0, 0.3), (0.4, 0.72))),
    ),
    "cat": (
        (ADD, ellipse(0, 0.2, 0.85, 0.75)),
        *_both(ADD, polygon((0.83, 0.1), (0.76, -1), (0.12, -0.48))),
        *_both(MARK, ellipse(0.33, 0.1, 0.12, 0.15)),
        (MARK, polygon((-0.13, 0.42), (0.13, 0.42), (0, 0.58))),
    ),
    "anchor": (
        (ADD, ellipse(0, 0.1, 0.92, 0.88, 0, 180)),
        (CUT, ellipse(0, 0.05, 0.6, 0.55, 0, 180)),
        *_both(ADD, polygon((0.5, 0.18), (0.98, -0.3), (1, 0.35))),
        (ADD, rectangle(-0.15, -0.6, 0.15, 0.9)),
        (ADD, rectangle(-0.5, -0.5, 0.5, -0.24)),
        (ADD, ellipse(0, -0.75, 0.26)),
        (CUT, ellipse(0, -0.76, 0.1)),
    ),
    "hammer": (
        (ADD, rectangle(-0.16, -0.6, 0.16, 1)),
        (ADD, rectangle(-0.75, -1, 0.35, -0.42)),
        (ADD, polygon((0.35, -0.95), (0.7, -0.85), (1, -0.4), (0.55, -0.6), (0.35, -0.48))),
    ),
}
