"""Which categories are taken for which? A confusion matrix and accuracies by category as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pretrain.visualize.markup import Html, element
from pretrain.visualize.numbers import percent

CELL = 19  # user units, about one CSS pixel each
BAR_HEIGHT = 19
MAX_CELLS = 40  # categories beyond which a matrix cannot be read
LETTER = 6.6  # width of a letter of a label


def confusion_matrix(counts: Int[np.ndarray, "k k"], categories: Sequence[str]) -> Html:
    """Rows are true categories, columns predicted ones; shades are shares of the row, numbers are counts."""
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    share = counts / totals
    size = len(categories)
    label = _label_width(categories)
    top = label * 0.78 + 14
    width, height = label + CELL * size + label * 0.62, top + CELL * size + 6
    parts = []
    for row in range(size):
        y = top + row * CELL
        parts.append(element("text", categories[row], x=label - 6, y=y + 13.5, text_anchor="end"))
        for column in range(size):
            parts += _cell(counts, share, categories, row, column, label + column * CELL, y)
    for column in range(size):
        x = label + (column + 0.62) * CELL
        turn = f"translate({x:.1f} {top - 7:.1f}) rotate(-52)"
        parts.append(element("text", categories[column], transform=turn))
    correct, total = int(np.trace(counts)), int(counts.sum())
    alt = f"confusion matrix of {size} categories, {correct} of {total} held-out images on the diagonal"
    view = f"0 0 {width:.0f} {height:.0f}"
    drawn = element(
        "svg",
        parts,
        viewBox=view,
        role="img",
        aria_label=alt,
        class_="matrix",
        style=f"min-width:{width * 0.86:.0f}px;max-width:{width * 1.35:.0f}px",
    )
    return element("div", drawn, class_="scroll", tabindex="0")


def _cell(counts, share, categories: Sequence[str], row: int, column: int, x: float, y: float) -> list[Html]:
    count = int(counts[row, column])
    title = element(
        "title",
        f"{categories[row]} taken for {categories[column]}: {count} ({percent(share[row, column], 0)})",
    )
    kind = "hit" if row == column else "miss"
    square = element(
        "rect",
        title,
        x=x + 0.5,
        y=y + 0.5,
        width=CELL - 1,
        height=CELL - 1,
        rx=1.5,
        class_=kind if count else "none",
        fill_opacity=0.12 + 0.88 * float(share[row, column]) if count else None,
    )
    if not count:
        return [square]
    shade = "on-dark" if share[row, column] > 0.45 else "on-light"
    number = element("text", count, x=x + CELL / 2, y=y + 13.2, text_anchor="middle", class_=f"count {shade}")
    return [square, number]


def accuracy_bars(
    accuracy: Sequence[float], num_images: Sequence[int], categories: Sequence[str], chance: float
) -> Html:
    """One bar a category, best first; the dashed line is chance."""
    order = sorted(range(len(categories)), key=lambda k: (-accuracy[k], categories[k]))
    label, length = _label_width(categories), 250.0
    width, height = label + length + 82, BAR_HEIGHT * len(order) + 24
    parts = []
    for place, k in enumerate(order):
        y = place * BAR_HEIGHT
        parts += [
            element("text", categories[k], x=label - 6, y=y + 13.5, text_anchor="end"),
            element("rect", x=label, y=y + 3, width=length, height=BAR_HEIGHT - 6, class_="track"),
            element(
                "rect",
                x=label,
                y=y + 3,
                width=max(length * accuracy[k], 0.5),
                height=BAR_HEIGHT - 6,
                class_="filled",
            ),
            element(
                "text", f"{100 * accuracy[k]:.0f} % of {num_images[k]}", x=label + length + 8, y=y + 13.5
            ),
        ]
    x = label + length * chance
    base = BAR_HEIGHT * len(order)
    parts.append(element("line", x1=x, x2=x, y1=0, y2=base + 4, class_="level"))
    parts.append(element("text", f"chance {percent(chance)}", x=x + 3, y=base + 16, class_="level-name"))
    best, worst = order[0], order[-1]
    alt = (
        f"accuracy by category, from {categories[best]} {percent(accuracy[best], 0)} "
        f"to {categories[worst]} {percent(accuracy[worst], 0)}"
    )
    return element(
        "svg",
        parts,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img",
        aria_label=alt,
        class_="bars",
        style=f"max-width:{width * 1.2:.0f}px",
    )


def _label_width(categories: Sequence[str]) -> float:
    return max(len(name) for name in categories) * LETTER + 14
