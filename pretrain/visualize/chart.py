"""How does a quantity move over the steps of a run? Line charts as inline SVG that follow the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.visualize.markup import Html, element
from pretrain.visualize.numbers import significant

SIZES = {"narrow": (344, 190), "wide": (526, 220)}  # user units, about one CSS pixel each on a wide screen
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 32  # margins
MAX_BINS = 300  # points of one line; longer series show the extremes of each bin
SMOOTHED = 12  # a smoothed value looks at 1 / SMOOTHED of the series


@dataclass(frozen=True)
class Line:
    name: str
    colour: str  # a CSS colour, usually var(--...)
    steps: Sequence[float]
    values: Sequence[float]
    is_smooth: bool = False  # a schedule: drawn once, without a faint raw line


@dataclass(frozen=True)
class Level:
    """A value to compare with, drawn dashed across the chart."""

    name: str
    value: float


@dataclass(frozen=True)
class Chart:
    """What to draw over the steps; at least one value must be finite."""

    title: str
    unit: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    is_log: bool = False
    from_zero: bool = False

    def __post_init__(self) -> None:
        if not any(np.isfinite(_positions(line, self.is_log)[1]).any() for line in self.lines):
            raise ValueError(f"chart {self.title!r} has no finite value; leave it out")


def draw(chart: Chart, size: str = "narrow") -> Html:
    """A titled chart: raw values faint, smoothed ones strong, levels dashed; not finite values leave gaps."""
    values = np.concatenate([_positions(line, chart.is_log)[1] for line in chart.lines])
    heights = [float(_scaled(level.value, chart.is_log)) for level in chart.levels]
    finite = [*values[np.isfinite(values)], *heights]
    low, high = _limits(min(finite), max(finite), chart.from_zero)
    first, last = min(min(line.steps) for line in chart.lines), max(max(line.steps) for line in chart.lines)
    frame = _Frame(first, max(last, first + 1), low, high, *SIZES[size])
    parts = [
        _grid(frame, chart.is_log),
        [_level(frame, level, height) for level, height in zip(chart.levels, heights, strict=True)],
        [_line(frame, line, chart.is_log) for line in chart.lines],
    ]
    ends = ", ".join(f"{line.name} {significant(_last_finite(line.values))}".strip() for line in chart.lines)
    alt = f"{chart.title} over steps; at the end {ends}"
    picture = element("svg", parts, viewBox=f"0 0 {frame.width} {frame.height}", role="img", aria_label=alt)
    return element("figure", _caption(chart.title, chart.unit, chart.lines), picture, class_="chart")


@dataclass(frozen=True)
class _Frame:
    """Maps steps and (log-)values to user units."""

    first: float
    last: float
    low: float
    high: float
    width: int
    height: int

    @property
    def right(self) -> float:
        return self.width - RIGHT

    @property
    def base(self) -> float:
        return self.height - BOTTOM

    def x(self, step: np.ndarray | float) -> np.ndarray | float:
        return LEFT + (step - self.first) / (self.last - self.first) * (self.right - LEFT)

    def y(self, value: np.ndarray | float) -> np.ndarray | float:
        return TOP + (self.high - value) / (self.high - self.low) * (self.base - TOP)


def _caption(title: str, unit: str, lines: Sequence[Line]) -> Html:
    keys = [
        element(
            "span",
            element("i", style=f"background:{line.colour}"),
            f"{line.name} " if len(lines) > 1 else "",
            element("b", significant(_last_finite(line.values))),
            class_="key",
        )
        for line in lines
    ]
    heading = element("span", element("strong", title), element("span", unit, class_="unit"), class_="title")
    return element("figcaption", heading, element("span", keys, class_="keys"))


def _last_finite(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return finite[-1] if finite else math.nan


def _scaled(value: float | np.ndarray, is_log: bool) -> np.ndarray:
    value = np.asarray(value, dtype=np.float64)
    if not is_log:
        return value
    return np.log10(np.where(value > 0, value, np.nan))


def _positions(line: Line, is_log: bool) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(line.steps, dtype=np.float64), _scaled(np.asarray(line.values), is_log)


def _limits(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    if from_zero:
        low = min(low, 0.0)
    is_flat = high - low < 1e-9 * max(abs(high), 1e-9)
    room = (abs(high) * 0.1 or 1.0) if is_flat else 0.06 * (high - low)
    return (low if from_zero and low == 0 else low - room), high + room


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) inside [low, high], about `wanted` of them."""
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    spacing = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    start, end = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    return [k * spacing for k in range(start, end + 1)]


def _value_ticks(low: float, high: float, is_log: bool) -> list[tuple[float, str]]:
    if not is_log:
        return [(tick, significant(tick)) for tick in nice_ticks(low, high)]
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        values = [f * 10.0**p for p in powers for f in factors if low <= math.log10(f * 10.0**p) <= high]
        if len(values) >= 3:
            break
    if len(values) < 2:
        values = [v for v in nice_ticks(10**low, 10**high) if v > 0]
    if len(values) > 6:
        values = values[:: math.ceil(len(values) / 5)]
    return [(math.log10(value), significant(value)) for value in values]


def _grid(frame: _Frame, is_log: bool) -> list[Html]:
    parts = []
    for value, label in _value_ticks(frame.low, frame.high, is_log):
        y = float(frame.y(value))
        parts.append(element("line", x1=LEFT, x2=frame.right, y1=y, y2=y, class_="grid"))
        parts.append(element("text", label, x=LEFT - 6, y=y + 4.0, text_anchor="end"))
    base = frame.base
    parts.append(element("line", x1=LEFT, x2=frame.right, y1=base, y2=base, class_="axis"))
    for step in nice_ticks(frame.first, frame.last, 4):
        if step != int(step):
            continue
        x = float(frame.x(step))
        parts.append(element("line", x1=x, x2=x, y1=base, y2=base + 4, class_="axis"))
        anchor = "end" if x > frame.right - 8 else "middle"
        parts.append(element("text", f"{step:,.0f}", x=x, y=base + 18, text_anchor=anchor))
    parts.append(element("text", "step", x=LEFT - 6, y=base + 18, text_anchor="end"))
    return parts


def _level(frame: _Frame, level: Level, height: float) -> list[Html]:
    y = float(frame.y(height))
    label_y = y - 5 if y - 5 > TOP + 8 else y + 13
    return [
        element("line", x1=LEFT, x2=frame.right, y1=y, y2=y, class_="level"),
        element("text", level.name, x=frame.right, y=label_y, text_anchor="end", class_="level-name"),
    ]


def _line(frame: _Frame, line: Line, is_log: bool) -> list[Html]:
    steps, values = _positions(line, is_log)
    style = f"stroke:{line.colour}"
    if line.is_smooth or len(values) < 8:
        return _paths(frame, *_decimated(steps, values), "line", style)
    smooth = smoothed(steps, values)
    raw = _paths(frame, *_decimated(steps, values), "raw", style)
    return raw + _paths(frame, *_decimated(steps, smooth), "line", style)


def smoothed(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """At each step the straight line fitted to the finite values around it, 1 / SMOOTHED of the series.

    A line and not a mean: at both ends of a falling curve a mean would lag. NaN where nothing is finite.
    Source: Cleveland, "Robust locally weighted regression", JASA 1979, with a flat window.
    """
    reach = max(len(values) // (2 * SMOOTHED), 2)
    place = np.arange(len(values))
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    finite = np.isfinite(values)
    x = (steps - steps[0]) / max(steps[-1] - steps[0], 1e-12)
    y = np.where(finite, values, 0.0)
    sums = [
        np.concatenate([[0.0], np.cumsum(finite * term)]) for term in (np.ones_like(x), x, y, x * x, x * y)
    ]
    n, sx, sy, sxx, sxy = (total[high] - total[low] for total in sums)
    count = np.maximum(n, 1)
    variance = sxx / count - (sx / count) ** 2
    slope = (sxy / count - sx * sy / count**2) / np.where(variance > 1e-12, variance, np.inf)
    return np.where(n > 0, sy / count + slope * (x - sx / count), np.nan)


def _decimated(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of each of at most MAX_BINS bins, in their order; short series as they are."""
    if len(values) <= 2 * MAX_BINS:
        return steps, values
    kept = []
    for places in np.array_split(np.arange(len(values)), MAX_BINS):
        finite = places[np.isfinite(values[places])]
        if len(finite):
            kept += sorted({finite[values[finite].argmin()], finite[values[finite].argmax()]})
    return steps[kept], values[kept]


def _paths(frame: _Frame, steps: np.ndarray, values: np.ndarray, class_: str, style: str) -> list[Html]:
    """One polyline for each stretch of finite values; a lone value becomes a dot."""
    parts = []
    finite = np.isfinite(values)
    borders = np.flatnonzero(np.diff(finite.astype(int))) + 1
    for stretch in np.split(np.arange(len(values)), borders):
        if not len(stretch) or not finite[stretch[0]]:
            continue
        x, y = frame.x(steps[stretch]), frame.y(values[stretch])
        if len(stretch) == 1:
            parts.append(element("circle", cx=float(x[0]), cy=float(y[0]), r=3, style=style, class_="dot"))
            continue
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        parts.append(element("polyline", points=points, style=style, class_=class_))
    return parts
