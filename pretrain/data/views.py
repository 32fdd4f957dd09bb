"""Which views of one image does training see, and where in the image do they lie?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from pretrain.config import Views
from pretrain.data.colour import Change, change_colours, draw_change

TRIES = 10  # crops drawn before the largest fitting one is taken from the middle

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class DrawnView(NamedTuple):
    """One view, before there are pixels."""

    box: Box  # in pixels of the whole image, flipped first where that is said
    is_flipped: bool
    change: Change


def draw_views(
    height: int, width: int, settings: Views, generator: Random, num_views: int = 2
) -> list[DrawnView]:
    """What is drawn for the views of an image of that many pixels; the first does not depend on the second."""
    drawn = []
    for which in range(num_views):
        is_flipped = generator.random() < settings.flip
        box = draw_crop(height, width, settings.scale, settings.ratio, generator)
        drawn.append(DrawnView(box, is_flipped, draw_change(settings, which, generator)))
    return drawn


def make_views(
    image: UInt8[Tensor, "h w 3"] | None, drawn: Sequence[DrawnView], size: int, with_colours: bool = True
) -> tuple[UInt8[Tensor, "2 3 s s"], Float[Tensor, "2 5"]]:
    """Pixels and boxes of the views that were drawn; what was not, or has no image, is zero.

    Without `with_colours` the colours are those of the image.
    """
    views, boxes = np.empty((2, 3, size, size), np.uint8), np.zeros((2, 5), np.float32)
    for which, one in enumerate(drawn):
        boxes[which] = [*one.box, one.is_flipped]
        if image is not None:
            levels = _unflipped(image, one.box, one.is_flipped, size)
            levels = change_colours(levels, one.change) if with_colours else levels
            _separate(levels, one.is_flipped, views[which])
    views[0 if image is None else len(drawn) :] = 0
    return torch.from_numpy(views), torch.from_numpy(boxes)


def _separate(
    levels: UInt8[np.ndarray, "s s 3"], is_flipped: bool, planes: UInt8[np.ndarray, "3 s s"]
) -> None:
    """Writes the colours to `planes`, mirrored if so said: of one colour at a time that costs a quarter."""
    if not is_flipped:
        cv2.split(levels, list(planes))
        return
    for colour, plane in zip(cv2.split(levels), planes, strict=True):
        cv2.flip(colour, 1, plane)


def draw_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: Random,
) -> Box:
    """A random box whose share of the area is uniform in `scale` and whose width / height is log-uniform in
    `ratio`; after TRIES that do not fit, the largest middle box within `ratio`. Source: Inception
    (arXiv 1409.4842), with the fall-back of torchvision's RandomResizedCrop."""
    for _ in range(TRIES):
        area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.random() * (height - h + 1))
            left = int(generator.random() * (width - w + 1))
            return top, left, h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(round(height * aspect), 1)), min(height, max(round(width / aspect), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def cut(image: UInt8[Tensor, "h w 3"], box: Box, is_flipped: bool, size: int) -> UInt8[Tensor, "3 s s"]:
    """The pixels inside `box` of the (flipped) image, resized to size x size."""
    levels = _unflipped(image, box, is_flipped, size)
    levels = cv2.flip(levels, 1) if is_flipped else levels  # torch takes three times as long, pixel by pixel
    return torch.from_numpy(levels).permute(2, 0, 1)


def _unflipped(
    image: UInt8[Tensor, "h w 3"], box: Box, is_flipped: bool, size: int
) -> UInt8[np.ndarray, "s s 3"]:
    """What `cut` gives before it is flipped: to flip the small result is the same as to flip the image."""
    top, left, height, width = box
    if is_flipped:
        left = image.shape[1] - left - width
    # In one piece: torch would make it so too, and takes four times as long.
    inside = np.ascontiguousarray(image.numpy()[top : top + height, left : left + width])
    return resize(torch.from_numpy(inside), size, size).permute(1, 2, 0).numpy()


def resize(image: UInt8[Tensor, "h w 3"], height: int, width: int) -> UInt8[Tensor, "3 a b"]:
    """Bicubic with antialiasing, in 8-bit fixed point: within 5 levels of Pillow, 8 times faster.

    The result lies in memory pixel by pixel, as the image does: so torch need not take the colours apart.
    """
    batch = image[None].permute(0, 3, 1, 2)  # unsqueezed, torch would not see that colours lie together
    return F.interpolate(batch, size=(height, width), mode="bicubic", antialias=True)[0]


def center_view(image: UInt8[Tensor, "h w 3"], size: int) -> UInt8[Tensor, "3 s s"]:
    """The view of evaluation: the short side resized to `size`, then the middle square."""
    height, width, top, left = _center(image.shape[0], image.shape[1], size)
    return resize(image, height, width)[:, top : top + size, left : left + size].contiguous()


def center_mask(mask: Int[Tensor, "h w"], size: int) -> Int[Tensor, "s s"]:
    """What `center_view` shows of a mask of the same image: the number below each pixel's centre, never a mean."""
    height, width, top, left = _center(mask.shape[0], mask.shape[1], size)
    rows = _nearest(mask.shape[0], height)[top : top + size]
    columns = _nearest(mask.shape[1], width)[left : left + size]
    return mask[rows][:, columns]


def _center(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Height and width of the resized image; top and left of its middle square."""
    short = min(height, width)
    height, width = max(round(height * size / short), size), max(round(width * size / short), size)
    return height, width, (height - size) // 2, (width - size) // 2


def _nearest(length: int, resized: int) -> Int[Tensor, " resized"]:
    """Which of `length` pixels in a row lies below the centre of each of `resized` ones."""
    return (2 * torch.arange(resized) + 1) * length // (2 * resized)
