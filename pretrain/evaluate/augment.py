"""How do timm's augmentations, which draw from global generators, depend on a seed alone?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

TRANSLATED = 0.45  # of a side, at most, as timm's own training has it


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's global generators drawn from `seed`; afterwards they are as they were."""
    python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)


def rand_augment(
    view: UInt8[Tensor, "3 s s"], settings: str, mean: tuple[float, ...], seed: int
) -> UInt8[Tensor, "3 s s"]:
    """The view under RandAugment (arXiv 1909.13719) with timm's `settings`; `mean`, RGB in [0, 1], fills gaps."""
    image = Image.fromarray(view.permute(1, 2, 0).numpy())
    transform = _transform(settings, view.shape[1], mean)
    with seeded(seed):
        changed = transform(image)
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1).contiguous()


@cache
def _transform(settings: str, size: int, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    fill = tuple(round(255 * level) for level in mean)
    return rand_augment_transform(settings, {"translate_const": int(TRANSLATED * size), "img_mean": fill})
