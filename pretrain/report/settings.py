"""How much does a report draw?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Pictures by section."""

    pairs: int = 4  # inputs of the first batch
    images: int = 12  # held-out images in neighbours, features and zero-shot
    candidates: int = 2000  # training images that neighbours are sought among
