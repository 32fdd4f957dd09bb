"""How do the colours of a view change at random? Drawn in the worker, applied there by OpenCV or on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from pretrain.config import Views

# YIQ (NTSC, 1953): luma, and two chroma axes in whose plane a rotation changes the hue.
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
FROM_YIQ = np.linalg.inv(TO_YIQ)
SIGMA_SIDE = 224  # pixels: Views.blur_sigma is given for views of this side
BLUR_REACH = 3.0  # standard deviations after which a blur is cut off


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


def change_colours(view: UInt8[Tensor, "3 s s"], change: Change) -> UInt8[Tensor, "3 s s"]:
    """The view with changed colours, in its own memory; rounded after the affine part and after the blur."""
    if change == Change():
        return view
    planes = list(view.numpy())
    levels = cv2.merge(planes)
    if change.is_recoloured:
        mean = [cv2.mean(plane)[0] for plane in planes]  # of the pixels together it takes seven times as long
        levels = cv2.transform(levels, affine(change, mean))  # cuts off at 0 and 255
    if change.sigma:
        levels = blur(levels, change.sigma)
    if change.solarize:
        levels = solarize(levels)
    cv2.split(levels, planes)
    return view


def affine(change: Change, mean: Sequence[float]) -> Float[np.ndarray, "3 4"]:
    """The changed colours as one affine map of RGB levels, 0 to 255; `mean` of the view's red, green and blue.

    The hue turns in YIQ, where torchvision uses HSV, and levels are clipped once at the end: the same as NVIDIA
    DALI's ColorTwist, and 10 to 20 times faster. In this form the four changes commute, so the random order
    that torchvision gives them makes no difference.
    """
    angle = 2 * math.pi * change.hue
    cos, sin = math.cos(angle), math.sin(angle)
    gain = change.brightness * change.contrast
    chroma = gain * change.saturation
    in_yiq = np.array([[gain, 0, 0], [0, chroma * cos, chroma * sin], [0, -chroma * sin, chroma * cos]])
    offset = np.full((3, 1), change.brightness * (1 - change.contrast) * (TO_YIQ[0] @ np.asarray(mean)))
    return np.hstack([FROM_YIQ @ in_yiq @ TO_YIQ, offset])


def blur(levels: UInt8[np.ndarray, "s s 3"], sigma: float) -> UInt8[np.ndarray, "s s 3"]:
    """Gaussian blur with standard deviation `sigma` pixels, cut off at BLUR_REACH of them, borders reflected.

    In float32 and rounded once: OpenCV's kernels of 8 bits would be slower, and darken.
    """
    radius = min(max(math.ceil(BLUR_REACH * sigma), 1), len(levels) - 1)
    weights = cv2.getGaussianKernel(2 * radius + 1, sigma, cv2.CV_32F)
    blurred = cv2.sepFilter2D(levels, cv2.CV_32F, weights, weights, borderType=cv2.BORDER_REFLECT_101)
    return cv2.convertScaleAbs(blurred)  # to the nearest whole level; none is negative


def solarize(levels: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Invert the upper half of the levels: of a level and its inverse (255 - level) the darker one."""
    return cv2.min(levels, cv2.bitwise_not(levels))
