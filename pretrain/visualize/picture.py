"""How does an array of pixels become a picture in a page, with boxes drawn on it?"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pretrain.visualize.markup import Child, Html, element

LONGEST = 256  # pixels of the longer side of an embedded picture
EXACT = 128  # pictures up to this side are stored without loss


@dataclass(frozen=True)
class Outline:
    """A rectangle on a picture: left, top, width, height in pixels of that picture."""

    left: float
    top: float
    width: float
    height: float
    colour: str  # CSS
    is_dashed: bool = False


def data_uri(image: UInt8[np.ndarray, "h w 3"], is_exact: bool = False, longest: int = LONGEST) -> str:
    """The pixels as a `data:` address: PNG when they must be exact, else JPEG with a side of at most `longest`."""
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    memory = io.BytesIO()
    if is_exact:
        picture.save(memory, "PNG", optimize=True)
    else:
        picture.save(memory, "JPEG", quality=90, optimize=True)
    kind = "png" if is_exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(memory.getvalue()).decode()}"


def photo(image: UInt8[np.ndarray, "h w 3"], alt: str, longest: int = LONGEST) -> Html:
    """A plain picture."""
    height, width = image.shape[:2]
    return element("img", src=data_uri(image, longest=longest), alt=alt, width=width, height=height)


def pixels(image: UInt8[np.ndarray, "h w 3"], alt: str) -> Html:
    """A picture of exact pixels, which stay square when it is shown enlarged."""
    height, width = image.shape[:2]
    is_small = max(height, width) <= EXACT
    return element("img", src=data_uri(image, is_small), alt=alt, width=width, height=height, class_="pixels")


def outlined(
    image: UInt8[np.ndarray, "h w 3"], alt: str, outlines: Sequence[Outline], between: Child = None
) -> Html:
    """The picture under rectangles with a light rim, so that they show on any ground; `between` lies below them."""
    height, width = image.shape[:2]
    thick = max(height, width) / 60
    parts: list[Child] = [element("image", href=data_uri(image), width=width, height=height), between]
    for outline in outlines:
        place = {
            "x": outline.left + thick / 2,
            "y": outline.top + thick / 2,
            "width": max(outline.width - thick, thick),
            "height": max(outline.height - thick, thick),
            "fill": "none",
        }
        dashes = f"{4 * thick:.3g} {2 * thick:.3g}" if outline.is_dashed else None
        parts.append(element("rect", **place, stroke="#fff", stroke_opacity=0.85, stroke_width=1.9 * thick))
        parts.append(
            element(
                "rect", **place, style=f"stroke:{outline.colour}", stroke_width=thick, stroke_dasharray=dashes
            )
        )
    return element("svg", parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=alt, class_="photo")


def mask_picture(mask: np.ndarray, alt: str) -> Html:
    """A boolean grid: filled squares where it is True."""
    side = mask.shape[0]
    cells = [
        element("rect", x=x, y=y, width=1, height=1, class_="second")
        for y in range(side)
        for x in range(side)
        if mask[y, x]
    ]
    ground = element("rect", width=side, height=side, class_="first")
    lines = [
        element("path", d="".join(f"M{k} 0V{side}M0 {k}H{side}" for k in range(side + 1)), class_="mesh")
    ]
    return element(
        "svg",
        ground,
        cells,
        lines,
        viewBox=f"0 0 {side} {side}",
        role="img",
        aria_label=alt,
        class_="photo mask",
    )
