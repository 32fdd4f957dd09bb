"""Where do the patches of the target view land in the input view? Drawn from the geometry that training uses."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pretrain.data.geometry import relative_positions
from pretrain.visualize.markup import Html, element
from pretrain.visualize.picture import Outline, data_uri, outlined

CORNERS = np.array([[[230, 159, 0], [0, 90, 181]], [[190, 40, 130], [90, 214, 190]]])  # RGB by row, column


def landing_cells(
    box_input: Float[Tensor, " 5"], box_target: Float[Tensor, " 5"], width: float, grid: int
) -> Float[Tensor, "patches 4"]:
    """Left, top, width, height of every target patch in the input view, in patches of the input view.

    The input view itself is the square [0, grid] x [0, grid]. Boxes and `width` are those of
    `relative_positions`; patches are row by row.
    """
    place = relative_positions(box_input[None], box_target[None], torch.tensor([float(width)]), grid)[0]
    y, x, log_height, log_width = place.unbind(1)
    height, width_ = log_height.exp(), log_width.exp()
    return torch.stack([x + 0.5 - width_ / 2, y + 0.5 - height / 2, width_, height], dim=1)


def patch_colours(grid: int) -> list[str]:
    """One CSS colour for each patch, blended between four corner colours: neighbours look alike, corners differ."""
    share = (np.arange(grid) + 0.5) / grid
    across = CORNERS[:, :1] + (CORNERS[:, 1:] - CORNERS[:, :1]) * share[None, :, None]  # [2, grid, 3]
    colours = across[0] + (across[1] - across[0]) * share[:, None, None]
    return [f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in colours.reshape(-1, 3)]


def tinted_view(view: UInt8[np.ndarray, "s s 3"], grid: int, alt: str) -> Html:
    """The target view with each patch in its colour."""
    picture = element("image", href=data_uri(view), width=grid, height=grid)
    colours = patch_colours(grid)
    cells = [_cell(place % grid, place // grid, 1.0, 1.0, colour) for place, colour in enumerate(colours)]
    view_box = f"0 0 {grid} {grid}"
    return element("svg", picture, cells, viewBox=view_box, role="img", aria_label=alt, class_="photo")


def landing(
    image: UInt8[np.ndarray, "h w 3"],
    box_input: Float[Tensor, " 5"],
    box_target: Float[Tensor, " 5"],
    grid: int,
    alt: str,
) -> Html:
    """The whole image, flipped as the input view is, that view's frame, and every target patch where it lands."""
    width = image.shape[1]
    top, left, box_height, box_width, is_flipped = box_input.tolist()
    seen = np.ascontiguousarray(image[:, ::-1]) if is_flipped else image
    cells = landing_cells(box_input, box_target, width, grid)
    scale = torch.tensor([box_width / grid, box_height / grid] * 2)
    places = (cells * scale + torch.tensor([left, top, 0.0, 0.0])).tolist()
    drawn = [_cell(*place, colour) for place, colour in zip(places, patch_colours(grid), strict=True)]
    frame = Outline(left, top, box_width, box_height, "var(--image_same)")
    return outlined(seen, alt, [frame], drawn)


def _cell(left: float, top: float, width: float, height: float, colour: str) -> Html:
    rim = 0.07 * min(width, height)
    return element(
        "rect",
        x=left + rim,
        y=top + rim,
        width=width - 2 * rim,
        height=height - 2 * rim,
        fill=colour,
        fill_opacity=0.34,
        stroke=colour,
        stroke_width=rim,
    )
