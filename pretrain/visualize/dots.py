"""How do methods compare on several measures? A panel a measure: mean, deviation and every seed, as one SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.visualize.markup import Html, element

NAMES, PANEL, GAP, ROW = (
    210,
    190,
    26,
    22,
)  # user units: width of names, of a panel, between panels; height of a row
HEAD, FOOT = 34, 30
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #222 } .title { font-weight: 600 } .small { font-size: 10px }
.grid { stroke: #ddd } .chance { stroke: #b33; stroke-dasharray: 3 3 } .bar { stroke: #46a; stroke-width: 2 }
.dot { fill: #46a } .seed { fill: none; stroke: #46a; opacity: .55 } .marked .dot { fill: #d60 }
.marked .bar, .marked .seed { stroke: #d60 } .marked text { font-weight: 600 } rect { fill: #fff }
"""


@dataclass(frozen=True)
class Dot:
    """One method on one measure, fractions."""

    mean: float
    deviation: float  # nan for a single seed
    values: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    title: str
    chance: float
    dots: tuple[Dot | None, ...]  # a row each, None where nothing was measured


def dot_panels(names: Sequence[str], panels: Sequence[Panel], marked: Sequence[str] = ()) -> str:
    """The SVG file. Filled dots are means, lines one standard deviation to either side, rings single seeds, the
    dashed line is chance; `marked` methods have another colour.
    """
    width, height = NAMES + len(panels) * (PANEL + GAP), HEAD + ROW * len(names) + FOOT
    parts = [element("style", Html(STYLE)), element("rect", width=width, height=height)]
    for place, name in enumerate(names):
        label = element("text", name, x=NAMES - 10, y=HEAD + ROW * (place + 0.66), text_anchor="end")
        parts.append(element("g", label, class_="marked" if name in marked else None))
    for index, panel in enumerate(panels):
        left = NAMES + index * (PANEL + GAP)
        is_marked = [name in marked for name in names]
        parts.append(element("g", _panel(panel, is_marked), transform=f"translate({left} 0)"))
    svg = element(
        "svg", parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", role="img"
    )
    return svg.text + "\n"


def _panel(panel: Panel, is_marked: Sequence[bool]) -> list[Html]:
    ends = [value for dot in panel.dots if dot for value in (*dot.values, dot.mean)] + [panel.chance]
    low, high = min(ends), max(ends)
    low, high = max(low - 0.06 * (high - low), 0.0), high + 0.06 * (high - low) + 1e-9

    def x(value: float) -> float:
        return PANEL * (min(max(value, low), high) - low) / (high - low)

    base = HEAD + ROW * len(panel.dots)
    parts = [element("text", panel.title, x=0, y=16, class_="title")]
    for quarter in range(5):
        value = low + (high - low) * quarter / 4
        parts.append(element("line", x1=x(value), x2=x(value), y1=HEAD, y2=base, class_="grid"))
        text = element(
            "text", f"{100 * value:.0f}", x=x(value), y=base + 16, text_anchor="middle", class_="small"
        )
        parts.append(text)
    parts.append(element("line", x1=x(panel.chance), x2=x(panel.chance), y1=HEAD, y2=base, class_="chance"))
    for place, dot in enumerate(panel.dots):
        if dot is not None:
            row = _dot(dot, HEAD + ROW * (place + 0.5), x)
            parts.append(element("g", row, class_="marked" if is_marked[place] else None))
    return parts


def _dot(dot: Dot, y: float, x) -> list[Html]:
    parts = [element("circle", cx=x(value), cy=y, r=3, class_="seed") for value in dot.values]
    if dot.deviation == dot.deviation:
        low, high = x(dot.mean - dot.deviation), x(dot.mean + dot.deviation)
        parts.append(element("line", x1=low, x2=high, y1=y, y2=y, class_="bar"))
    return [*parts, element("circle", cx=x(dot.mean), cy=y, r=4.5, class_="dot")]
