"""Which thing does each pixel of an evaluated view belong to?"""

from __future__ import annotations

import io
import json
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from data_prep.headers import MAX_PIXELS
from pretrain.data.faults import BadSample
from pretrain.data.views import center_mask

MASK, RECORD = "mask.png", "json"  # members of a sample; the record names the things that the mask numbers


# What Pillow's readers raise on damaged files, and of files too large.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Mask:
    """The things of one image, or of a center view of it."""

    numbers: Int[Tensor, "h w"]  # int16; 0 = ground, i = kinds[i - 1]
    kinds: tuple[str, ...]  # of thing i + 1; things of one kind may be several


def read_mask(members: dict[str, bytes], height: int, width: int, size: int) -> Mask | None:
    """The mask of an image of height x width pixels in its center view of `size`; None when it has none.

    Raises what `read_numbers` does.
    """
    found = read_numbers(members, height, width)
    return None if found is None else Mask(center_mask(found.numbers, size), found.kinds)


def read_numbers(members: dict[str, bytes], height: int, width: int) -> Mask | None:
    """The mask of a whole image of height x width pixels; None when it has none.

    Raises BadSample `bad_mask` when the mask does not decode, fits another image, or numbers a thing that the
    record does not name.
    """
    if MASK not in members:
        return None
    try:
        with opened(io.BytesIO(members[MASK])) as png:
            pixels = np.array(png).astype(np.int64)
        kinds = tuple(str(thing["name"]) for thing in json.loads(members[RECORD])["objects"])
    except (*UNREADABLE, KeyError, TypeError, RecursionError) as error:
        raise BadSample("bad_mask", f"mask or its objects cannot be read: {error!r}") from error
    if pixels.shape != (height, width) or pixels.min() < 0 or pixels.max() > len(kinds):
        raise BadSample(
            "bad_mask",
            f"mask of shape {pixels.shape} with numbers from {pixels.min()} to {pixels.max()} must have the "
            f"image's {height} x {width} pixels and its {len(kinds)} objects",
        )
    return Mask(torch.from_numpy(pixels.astype(np.int16)), kinds)


@contextmanager
def opened(file: Path | io.BytesIO) -> Iterator[Image.Image]:
    """An image whose pixels are not read yet; raises one of UNREADABLE, also for more than MAX_PIXELS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is stricter
        image = Image.open(file)
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS}")
        yield image
