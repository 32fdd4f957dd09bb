"""What do token features look like? Their principal components as red, green and blue."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

CLIPPED = 0.01  # share of values beyond black and beyond full brightness in each channel


def principal_rgb(tokens: Float[Tensor, "n l d"]) -> UInt8[np.ndarray, "n g g 3"]:
    """Token grids as pictures: the first three principal components of all tokens are red, green and blue.

    The largest weight of each component is positive, so that equal features give equal colours; a component
    without variance is mid-grey. Raises ValueError unless l is a square number and d at least 3.
    """
    n, length, d = tokens.shape
    grid = round(length**0.5)
    if grid * grid != length or d < 3:
        raise ValueError(
            f"tokens {n} x {length} x {d} must form square grids of at least 3 features to be shown"
        )
    flat = tokens.reshape(-1, d).double()
    centred = flat - flat.mean(dim=0)
    weights = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3].T  # largest variance first
    largest = weights.gather(1, weights.abs().argmax(dim=1, keepdim=True))
    values = (centred @ (weights * largest.sign()).T).numpy()
    low, high = np.quantile(values, [CLIPPED, 1 - CLIPPED], axis=0)
    spread = high - low
    share = np.where(spread > 1e-9, (values - low) / np.maximum(spread, 1e-9), 0.5)
    return (share.clip(0, 1) * 255).round().astype(np.uint8).reshape(n, grid, grid, 3)
