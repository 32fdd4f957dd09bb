"""What does a frozen encoder say of views? Its features, and the codebook entries nearest to them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor, nn

from pretrain.initial.files import digest_of
from pretrain.models.pixels import normalise

RUN_BYTES = 64 * 2**20  # of the cosines of tokens and codes that exist at once


@dataclass(frozen=True)
class Opened:
    """A frozen encoder as a folder gave it."""

    tower: nn.Module  # normalised images [n, 3, s, s] in its dtype -> [n, 1 + l, width], summary first
    width: int  # of its features
    patch: int  # pixels along one side of a token
    grid: int  # tokens along one side of the images that it was trained on
    mean: tuple[float, ...]  # of RGB in [0, 1]
    std: tuple[float, ...]
    folder: Path
    files: tuple[str, ...]  # all that was read, relative to the folder


class Guide(nn.Module):
    """A frozen encoder, with a codebook a tokenizer: in eval mode for good, out of reach of gradients.

    Its parameters are ordinary ones, read outside the modules that own them: keep it out of ZeRO-3.
    """

    def __init__(self, opened: Opened, codebook: Float32[Tensor, "k d"] | None = None) -> None:
        super().__init__()
        self.tower = opened.tower
        self.width, self.patch, self.grid = opened.width, opened.patch, opened.grid
        self.mean, self.std = opened.mean, opened.std
        self.folder, self.files = opened.folder, opened.files
        self.num_codes = 0 if codebook is None else len(codebook)
        self.register_buffer("codebook", codebook)
        self.sha256 = fingerprint(opened.folder, opened.files)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Guide:
        """Stays in eval mode, whatever the module around it does."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Guide:
        """Moves the codebook with the module but keeps it in float32, unrounded: other entries would be nearest."""
        kept = self.codebook
        super()._apply(fn, recurse)
        if kept is not None and not kept.is_meta:
            self.codebook = kept.to(self.codebook.device)
        return self

    @torch.no_grad()
    def forward(self, views: UInt8[Tensor, "n 3 s s"], grid: int) -> Float32[Tensor, "n l d"]:
        """Features of a summary and of grid x grid tokens, row by row: [n, 1 + grid * grid, width].

        The summary is the class token, the mean of the tokens where there is none. Views are resized to
        grid * patch pixels, bicubic with antialiasing, on their device, and normalised as the guide was
        trained. Computed in the dtype of the parameters. ValueError when the encoder has no such grid.
        """
        features = self.tower(self._images(views, grid * self.patch))
        if features.shape[1] != 1 + grid**2:
            raise ValueError(
                f"grid={grid} gives {features.shape[1] - 1} tokens of {self.folder} instead of {grid**2}: choose a "
                f"multiple of its stages' strides, such as {self.grid}"
            )
        return features.float()

    @torch.no_grad()
    def codes(self, views: UInt8[Tensor, "n 3 s s"], grid: int) -> Int[Tensor, "n l"]:
        """Number of the codebook entry nearest to each token by cosine, [n, grid * grid].

        ValueError for a guide without codebook.
        """
        if self.codebook is None:
            raise ValueError(
                f"{self.folder} is a guide without codebook: make a tokenizer of it by `python -m pretrain.codebook`"
            )
        tokens = self(views, grid)[:, 1:]
        return nearest_codes(tokens.flatten(0, 1), self.codebook)[0].view(tokens.shape[:2])

    def _images(self, views: UInt8[Tensor, "n 3 s s"], size: int) -> Float[Tensor, "n 3 a a"]:
        pixels = views.float()
        if views.shape[-1] != size:
            pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0, 255)
        return normalise(pixels, self.mean, self.std, next(self.tower.parameters()).dtype)


def nearest_codes(
    tokens: Float[Tensor, "t d"], codebook: Float[Tensor, "k d"]
) -> tuple[Int[Tensor, " t"], Float32[Tensor, " t"]]:
    """Number of the entry with the largest cosine to each token, and that cosine; in float32."""
    entries = F.normalize(codebook.float(), dim=-1)
    runs = tokens.split(max(RUN_BYTES // (4 * len(entries)), 1))
    best = [(F.normalize(run.float(), dim=-1) @ entries.T).max(dim=-1) for run in runs]
    return torch.cat([each.indices for each in best]), torch.cat([each.values for each in best])


def fingerprint(folder: Path, files: Iterable[str]) -> str:
    """SHA-256 over the names and contents of files: a guide with other weights or pixels has another one."""
    lines = [f"{name} {digest_of(folder / name)}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
