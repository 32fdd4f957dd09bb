"""How do pictures and counts become one HTML file that needs nothing else and stays small?"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from data_prep.images import DAMAGED

SIDE = 160  # pixels, longer side of a thumbnail
QUALITY = 72  # of its JPEG
MOST_BYTES = 4_000_000  # of a page; pictures beyond it are left out, and the page says so
MOST_BARS = 40
LONGEST_CAPTION = 160  # characters
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ddd }
h3 { font-size: 1rem }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px }
.row { display: flex; flex-wrap: wrap; gap: .8rem; margin: .6rem 0 }
.group { border: 1px solid #ccc; border-radius: 6px; padding: .5rem; display: flex; gap: .6rem }
figure { margin: 0; width: 170px; font-size: 12px; overflow-wrap: anywhere }
figure img { max-width: 160px; display: block }
figcaption small { color: #777 }
svg text { font: 11px system-ui, sans-serif }
"""


class Page:
    """An HTML page under construction; `html` ends it."""

    def __init__(self, title: str) -> None:
        self._parts = [f"<h1>{escape(title)}</h1>"]
        self._title, self._size, self._left_out = title, 0, 0

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Lines as they are, in one width."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def pictures(self, figures: Sequence[tuple[bytes, str, str]]) -> None:
        """Pictures in rows: encoded image, caption, and a small line below."""
        self._parts.append(f'<div class="row">{self._figures(figures)}</div>')

    def groups(self, groups: Sequence[Sequence[tuple[bytes, str, str]]]) -> None:
        """Pictures that belong together, side by side."""
        shown = [f'<div class="group">{inside}</div>' for group in groups if (inside := self._figures(group))]
        self._parts.append(f'<div class="row">{"".join(shown)}</div>')

    def histogram(self, title: str, counts: Mapping[Any, int]) -> None:
        """Bars of the counts; many numbers are put into bins."""
        if counts:
            self._parts.append(f"<h3>{escape(title)}</h3>{_bars(_binned(counts))}")

    def html(self) -> str:
        """The whole file."""
        if self._left_out:
            self._parts.append(
                f"<p>{self._left_out} more pictures are left out, to keep this page small.</p>"
            )
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self._title)}</title>'
            f"<style>{STYLE}</style></head><body>{''.join(self._parts)}</body></html>\n"
        )

    def _figures(self, figures: Sequence[tuple[bytes, str, str]]) -> str:
        drawn = []
        for content, caption, below in figures:
            figure = _figure(content, caption, below)
            if self._size + len(figure) > MOST_BYTES:
                self._left_out += 1
                continue
            self._size += len(figure)
            drawn.append(figure)
        return "".join(drawn)


def _figure(content: bytes, caption: str, below: str) -> str:
    short = caption if len(caption) <= LONGEST_CAPTION else caption[:LONGEST_CAPTION] + "..."
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{base64.b64encode(thumbnail(content)).decode()}">'
        f"<figcaption>{escape(short)}<br><small>{escape(below)}</small></figcaption></figure>"
    )


def thumbnail(content: bytes) -> bytes:
    """A small JPEG of an encoded image, on white; a grey square where it does not decode."""
    try:
        image = Image.open(io.BytesIO(content))
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        image = image.convert("RGBA")
        image.thumbnail((SIDE, SIDE))
        drawn = Image.new("RGB", image.size, "white")
        drawn.paste(image, mask=image.getchannel("A"))
    except DAMAGED:
        drawn = Image.new("RGB", (SIDE, SIDE), "#bbb")
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _binned(counts: Mapping[Any, int]) -> list[tuple[str, int]]:
    """Names by falling count; numbers in order, in at most MOST_BARS bins."""
    if any(isinstance(value, str) for value in counts):
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_BARS]
    values = sorted(counts)
    if len(values) <= MOST_BARS:
        return [(f"{value:g}", counts[value]) for value in values]
    low, high = values[0], values[-1]
    width = (high - low) / MOST_BARS
    bins = [0] * MOST_BARS
    for value in values:
        bins[min(MOST_BARS - 1, int((value - low) / width))] += counts[value]
    return [(f"{low + width * number:.4g}", count) for number, count in enumerate(bins)]


def _bars(bars: Sequence[tuple[str, int]]) -> str:
    top = max(count for _, count in bars) or 1
    lines = []
    for row, (name, count) in enumerate(bars):
        width, y = 420 * count / top, 16 * row
        lines.append(
            f'<text x="195" y="{y + 12}" text-anchor="end">{escape(name[:30])}</text>'
            f'<rect x="200" y="{y + 2}" width="{width:.1f}" height="12" fill="#4a7ab5"/>'
            f'<text x="{205 + width:.1f}" y="{y + 12}">{count:,}</text>'
        )
    return f'<svg width="720" height="{16 * len(bars) + 4}">{"".join(lines)}</svg>'
