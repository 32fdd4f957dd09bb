"""How do the colours of a view change at random?"""

from __future__ import annotations

import math
from random import Random

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pretrain.config import Views

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in Pillow's grayscale
TO_GREY = np.tile(LUMA, (3, 1))  # RGB -> the same luma in every channel
SAME = np.eye(3)
# Chroma axes of YIQ (NTSC, 1953): a rotation in their plane changes the hue and keeps the luma.
TO_YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
FROM_YIQ = np.linalg.inv(TO_YIQ)
SIGMA_SIDE = 224  # pixels: Views.blur_sigma is given for views of this side
SOLARIZE_FROM = 128  # levels at and above are inverted


def change_colours(
    view: UInt8[Tensor, "3 s s"], settings: Views, which: int, generator: Random
) -> UInt8[Tensor, "3 s s"]:
    """Jitter, grayscale, blur and solarize, each by its probability for view `which` (0 or 1).

    Source: SiameseIM (arXiv 2206.01204), appendix. Everything before solarize is done in float32 and rounded
    once.
    """
    is_jittered = generator.random() < settings.jitter_probability
    factors = draw_jitter(settings.jitter, generator) if is_jittered else []
    if generator.random() < settings.grayscale:
        factors.append(("saturation", 0.0))
    is_blurred = generator.random() < settings.blur[which]
    is_solarized = generator.random() < settings.solarize[which]
    if factors or is_blurred:
        colours = view.float()
        if factors:
            colours = recolour(colours, factors)
        if is_blurred:
            colours = blur(colours, generator.uniform(*settings.blur_sigma) * view.shape[1] / SIGMA_SIDE)
        view = colours.round_().to(torch.uint8)
    return solarize(view) if is_solarized else view


def draw_jitter(strengths: tuple[float, float, float, float], generator: Random) -> list[tuple[str, float]]:
    """The four changes of a colour jitter in random order: factors in [1 - strength, 1 + strength] for
    brightness, contrast and saturation, a turn in [-strength, strength] for the hue."""
    low_high = [(max(1 - strength, 0.0), 1 + strength) for strength in strengths[:3]]
    low_high.append((-strengths[3], strengths[3]))
    drawn = [(name, generator.uniform(*bounds)) for name, bounds in zip(CHANGES, low_high, strict=True)]
    return sorted(drawn, key=lambda _: generator.random())


def recolour(colours: Float[Tensor, "3 h w"], factors: list[tuple[str, float]]) -> Float[Tensor, "3 h w"]:
    """Apply (change, factor) pairs one after the other, as one affine map of RGB; levels 0 to 255.

    Levels are clipped after all of them, not in between, and the hue turns in the YIQ plane, where
    torchvision uses HSV: the same as NVIDIA DALI's ColorTwist, and 10 to 20 times faster.
    """
    mean = colours.mean(dim=(1, 2)).double().numpy()
    matrix, offset = SAME, np.zeros(3)
    for change, factor in factors:
        step, added = CHANGES[change](factor, matrix @ mean + offset)
        matrix, offset = step @ matrix, step @ offset + added
    weights, bias = torch.from_numpy(matrix).float(), torch.from_numpy(offset).float()
    return torch.addmm(bias[:, None], weights, colours.flatten(1)).clamp_(0, 255).view_as(colours)


def _brightness(factor: float, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return factor * SAME, np.zeros(3)


def _contrast(factor: float, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return factor * SAME, np.full(3, (1 - factor) * (LUMA @ mean))


def _saturation(factor: float, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return factor * SAME + (1 - factor) * TO_GREY, np.zeros(3)


def _hue(turns: float, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    rotation = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    return FROM_YIQ @ rotation @ TO_YIQ, np.zeros(3)


# Each gives the matrix and offset of one change, from its factor and the mean colour before it.
CHANGES = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}


def blur(colours: Float[Tensor, "3 s s"], sigma: float) -> Float[Tensor, "3 s s"]:
    """Gaussian blur with standard deviation `sigma` pixels; at the border the weights inside are normalised.

    Two products with a banded matrix: on one core as fast as sliding kernels at 224 pixels, and faster below.
    """
    places = torch.arange(colours.shape[1], dtype=torch.float32)
    weights = torch.exp(-0.5 * ((places[:, None] - places) / max(sigma, 1e-3)) ** 2)
    weights /= weights.sum(dim=1, keepdim=True)
    return weights @ colours @ weights.T


def solarize(view: UInt8[Tensor, "3 s s"]) -> UInt8[Tensor, "3 s s"]:
    """Invert the levels from SOLARIZE_FROM up."""
    return torch.where(view >= SOLARIZE_FROM, 255 - view, view)
