"""How do the colours of a view change at random? One draw; OpenCV applies it to a view, torch to a batch of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pretrain.config import SIGMA_SIDE, Views

# YIQ (NTSC, 1953): luma, and two chroma axes in whose plane a rotation changes the hue.
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
FROM_YIQ = np.linalg.inv(TO_YIQ)
LUMA = TO_YIQ[0].tolist()
# Every linear change here is a sum of three maps: the luma alone, the chroma alone, the chroma turned by a quarter.
ONTO_LUMA = FROM_YIQ @ np.diag([1.0, 0.0, 0.0]) @ TO_YIQ
ONTO_CHROMA = FROM_YIQ @ np.diag([0.0, 1.0, 1.0]) @ TO_YIQ
QUARTER_TURN = FROM_YIQ @ np.array([[0.0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ TO_YIQ
MAPS = (
    np.stack([ONTO_LUMA, ONTO_CHROMA, QUARTER_TURN], -1).reshape(9, 3).tolist()
)  # numbers of the three, by place
BLUR_REACH = 3.0  # standard deviations after which a blur is cut off
LEAST_SIGMA = 0.25  # pixels; a neighbour has a weight of 0.0003 there, so less rounds to nothing


class Change(NamedTuple):
    """A change of colours; the defaults change nothing."""

    brightness: float = 1.0  # factor of all levels
    contrast: float = 1.0  # factor of the distance from the view's mean luma
    saturation: float = 1.0  # factor of the chroma; 0 = grayscale
    hue: float = 0.0  # turns of the chroma
    sigma: float = 0.0  # pixels, standard deviation of the blur; 0 = none
    solarize: float = 0.0  # 1 = invert the upper half of the levels

    @property
    def is_recoloured(self) -> bool:
        return self[:4] != Change()[:4]

    def numbers(self) -> list[float]:
        """What `change_batch` wants to know: the map of the colours by rows, its part of the luma, blur, solarize."""
        matrix, pull = _mix(self)
        return [*matrix, pull, self.sigma, self.solarize]


def draw_change(settings: Views, which: int, generator: Random) -> Change:
    """Jitter, grayscale, blur and solarize, each by its probability for view `which` (0 or 1).

    Source: SiameseIM (arXiv 2206.01204), appendix.
    """
    is_jittered = generator.random() < settings.jitter_probability
    change = draw_jitter(settings.jitter, generator) if is_jittered else Change()
    if generator.random() < settings.grayscale:
        change = change._replace(saturation=0.0)
    is_blurred = generator.random() < settings.blur[which]
    is_solarized = generator.random() < settings.solarize[which]
    sigma = generator.uniform(*settings.blur_sigma) * settings.size / SIGMA_SIDE if is_blurred else 0.0
    return change._replace(sigma=sigma, solarize=float(is_solarized))


def draw_jitter(strengths: tuple[float, float, float, float], generator: Random) -> Change:
    """Factors uniform in [1 - strength, 1 + strength] and not negative, the hue in [-strength, strength]."""
    factors = [generator.uniform(max(1 - strength, 0.0), 1 + strength) for strength in strengths[:3]]
    return Change(*factors, generator.uniform(-strengths[3], strengths[3]))


def change_colours(levels: UInt8[np.ndarray, "s s 3"], change: Change) -> UInt8[np.ndarray, "s s 3"]:
    """The changed view, by OpenCV on one core; rounded after the affine part and after the blur."""
    if change.is_recoloured:
        levels = cv2.transform(levels, affine(change, mean_colour(levels)))  # cuts off at 0 and 255
    if change.sigma > LEAST_SIGMA:
        levels = blur(levels, change.sigma)
    return solarize(levels) if change.solarize else levels


def mean_colour(levels: UInt8[np.ndarray, "s s 3"]) -> list[float]:
    """Mean red, green and blue; cv2.mean takes nine times as long."""
    num_pixels = levels.size // 3
    return [one / num_pixels for one in cv2.sumElems(levels)[:3]]


def affine(change: Change, mean: Sequence[float]) -> Float[np.ndarray, "3 4"]:
    """The changed colours as one affine map of RGB levels, 0 to 255; `mean` of the view's red, green and blue."""
    matrix, pull = _mix(change)
    added = pull * sum(weight * level for weight, level in zip(LUMA, mean, strict=True))
    return np.array([[*matrix[:3], added], [*matrix[3:6], added], [*matrix[6:], added]])


def _mix(change: Change) -> tuple[list[float], float]:
    """The linear part of the map, row by row, and how much of the view's mean luma is added to every level.

    The hue turns in YIQ, where torchvision uses HSV, and levels are clipped once at the end: the same as NVIDIA
    DALI's ColorTwist, and 10 to 20 times faster. In this form the four changes commute, so the random order
    that torchvision gives them makes no difference.
    """
    angle = 2 * math.pi * change.hue
    gain = change.brightness * change.contrast
    chroma = gain * change.saturation
    along, across = chroma * math.cos(angle), chroma * math.sin(angle)
    matrix = [gain * luma + along * same + across * turned for luma, same, turned in MAPS]
    return matrix, change.brightness * (1 - change.contrast)


def reach(sigma: float, size: int) -> int:
    """Pixels to each side that a blur of a view of `size` pixels takes in."""
    return min(max(math.floor(BLUR_REACH * sigma), 1), size - 1)


def blur(levels: UInt8[np.ndarray, "s s 3"], sigma: float) -> UInt8[np.ndarray, "s s 3"]:
    """Gaussian blur with standard deviation `sigma` pixels, cut off at BLUR_REACH of them, borders reflected.

    In float32 and rounded once: OpenCV's own kernels of 8 bits would be slower, and darken.
    """
    weights = cv2.getGaussianKernel(2 * reach(sigma, len(levels)) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(levels, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)


def solarize(levels: UInt8[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Invert the upper half of the levels: of a level and its inverse (255 - level) the darker one."""
    return cv2.min(levels, cv2.bitwise_not(levels))


def change_batch(
    views: UInt8[Tensor, "n 3 s s"], changes: Float[Tensor, "n 12"], largest_sigma: float
) -> UInt8[Tensor, "n 3 s s"]:
    """The same as `change_colours`, to one level, of many views at once on any device.

    `changes`, on the CPU, are `Change.numbers()` of each view, none of which blurs by more than `largest_sigma`
    pixels.
    """
    from kornia.filters import gaussian_blur2d  # takes a second; a worker does without

    levels = views.float()
    # By numbers of Python: a tensor of them would make the host wait for the device.
    luma = sum(weight * mean for weight, mean in zip(LUMA, levels.mean(dim=(2, 3)).unbind(1), strict=True))
    parts = [9, 1, 1, 1]
    _, _, sigmas, _ = changes.split(parts, dim=1)
    matrix, pull, sigma, is_solarized = changes.to(views.device, non_blocking=True).split(parts, dim=1)
    flat = torch.baddbmm((pull * luma[:, None])[..., None], matrix.view(-1, 3, 3), levels.flatten(2))
    levels = flat.clamp(0, 255).round().view_as(levels)
    if largest_sigma:
        taps = 2 * reach(largest_sigma, views.shape[-1]) + 1
        # From the CPU: kornia looks whether they are positive, and the host would wait for the device's.
        blurred = gaussian_blur2d(levels, taps, sigmas.clamp(min=1e-3).expand(-1, 2), border_type="reflect")
        levels = torch.where(sigma[..., None, None] > 0, blurred.round(), levels)
    inverted = torch.minimum(levels, 255 - levels)
    return torch.where(is_solarized[..., None, None] > 0, inverted, levels).to(torch.uint8)


def largest_sigma(settings: Views) -> float:
    """Pixels: the widest blur that `draw_change` can draw; 0 without any."""
    return settings.blur_sigma[1] * settings.size / SIGMA_SIDE if any(settings.blur) else 0.0
