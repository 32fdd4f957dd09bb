"""How far did accuracies move? One row a measure: before, after, chance and the 95 % interval as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.visualize.markup import Html, element
from pretrain.visualize.numbers import percent

LEFT, LENGTH, RIGHT = 14, 580, 26  # user units
ROW, HEAD, FOOT = 52, 4, 30
EXTENTS = (0.1, 0.2, 0.5, 1.0)  # accuracies at which the axis may end


@dataclass(frozen=True)
class Measure:
    """Accuracy of one checkpoint by one probe, all in [0, 1]."""

    accuracy: float
    interval: tuple[float, float] | None = None  # None where nothing tells how sure it is

    @property
    def high(self) -> float:
        """The largest value to be shown."""
        return self.accuracy if self.interval is None else self.interval[1]


@dataclass(frozen=True)
class Move:
    title: str
    chance: float
    before: Measure | None
    after: Measure


def dumbbells(moves: Sequence[Move]) -> Html:
    """Hollow dots are before training, filled ones after it, ticks are chance; lines across dots are intervals."""
    parts = []
    base = HEAD + ROW * len(moves)
    largest = max(max(move.after.high, move.before.high if move.before else 0, move.chance) for move in moves)
    extent = next((extent for extent in EXTENTS if extent >= min(largest, 1.0)), 1.0)
    for fifth in range(6):
        x = LEFT + LENGTH * fifth / 5
        parts.append(element("line", x1=x, x2=x, y1=HEAD, y2=base, class_="grid"))
        anchor = {0: "start", 5: "end"}.get(fifth, "middle")
        parts.append(
            element("text", f"{100 * extent * fifth / 5:.0f} %", x=x, y=base + 22, text_anchor=anchor)
        )
    for place, move in enumerate(moves):
        parts += _row(move, HEAD + ROW * (place + 0.68), LENGTH / extent)
    said = "; ".join(_said(move) for move in moves)
    view = f"0 0 {LEFT + LENGTH + RIGHT} {base + FOOT}"
    return element("svg", parts, viewBox=view, role="img", aria_label=said, class_="dumbbells")


def _said(move: Move) -> str:
    start = f"{percent(move.before.accuracy)} to " if move.before else ""
    return f"{move.title} {start}{percent(move.after.accuracy)}, chance {percent(move.chance)}"


def _row(move: Move, y: float, length: float) -> list[Html]:
    """`length` is that of an accuracy of 1."""
    parts = [element("text", move.title, x=0, y=y - 17, class_="name")]
    chance = LEFT + move.chance * length
    parts.append(element("line", x1=chance, x2=chance, y1=y - 10, y2=y + 10, class_="chance"))
    end = LEFT + move.after.accuracy * length
    if move.before:
        start = LEFT + move.before.accuracy * length
        parts.append(element("line", x1=start, x2=end, y1=y, y2=y, class_="path"))
        parts += _whisker(move.before, y, length, "before")
        parts.append(element("circle", cx=start, cy=y, r=5, class_="before"))
    parts += _whisker(move.after, y, length, "after")
    parts.append(element("circle", cx=end, cy=y, r=6, class_="after"))
    return parts


def _whisker(measure: Measure, y: float, length: float, class_: str) -> list[Html]:
    if measure.interval is None:
        return []
    low, high = (LEFT + bound * length for bound in measure.interval)
    ends = f"M{low:.1f} {y - 5:.1f}v10M{high:.1f} {y - 5:.1f}v10M{low:.1f} {y:.1f}H{high:.1f}"
    return [element("path", d=ends, class_=f"whisker {class_}")]
