"""How far did accuracies move? One row a measure: before, after, chance and the 95 % interval as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.visualize.markup import Html, element
from pretrain.visualize.numbers import percent

LEFT, LENGTH, RIGHT = 14, 580, 26  # user units
ROW, HEAD, FOOT = 52, 4, 30


@dataclass(frozen=True)
class Measure:
    """Accuracy of one checkpoint by one probe, all in [0, 1]."""

    accuracy: float
    low: float
    high: float


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
    for tenth in range(0, 11, 2):
        x = _x(tenth / 10)
        parts.append(element("line", x1=x, x2=x, y1=HEAD, y2=base, class_="grid"))
        anchor = {0: "start", 10: "end"}.get(tenth, "middle")
        parts.append(element("text", f"{10 * tenth} %", x=x, y=base + 22, text_anchor=anchor))
    for place, move in enumerate(moves):
        parts += _row(move, HEAD + ROW * (place + 0.68))
    said = "; ".join(_said(move) for move in moves)
    view = f"0 0 {LEFT + LENGTH + RIGHT} {base + FOOT}"
    return element("svg", parts, viewBox=view, role="img", aria_label=said, class_="dumbbells")


def _said(move: Move) -> str:
    start = f"{percent(move.before.accuracy)} to " if move.before else ""
    return f"{move.title} {start}{percent(move.after.accuracy)}, chance {percent(move.chance)}"


def _x(share: float) -> float:
    return LEFT + share * LENGTH


def _row(move: Move, y: float) -> list[Html]:
    parts = [element("text", move.title, x=0, y=y - 17, class_="name")]
    chance = _x(move.chance)
    parts.append(element("line", x1=chance, x2=chance, y1=y - 10, y2=y + 10, class_="chance"))
    if move.before:
        start, end = _x(move.before.accuracy), _x(move.after.accuracy)
        parts.append(element("line", x1=start, x2=end, y1=y, y2=y, class_="path"))
        parts += _whisker(move.before, y, "before")
        parts.append(element("circle", cx=start, cy=y, r=5, class_="before"))
    parts += _whisker(move.after, y, "after")
    parts.append(element("circle", cx=_x(move.after.accuracy), cy=y, r=6, class_="after"))
    return parts


def _whisker(measure: Measure, y: float, class_: str) -> list[Html]:
    low, high = _x(measure.low), _x(measure.high)
    ends = f"M{low:.1f} {y - 5:.1f}v10M{high:.1f} {y - 5:.1f}v10M{low:.1f} {y:.1f}H{high:.1f}"
    return [element("path", d=ends, class_=f"whisker {class_}")]
