"""Which residual branches does an image drop? A function of its key alone, whoever computes it and with what else."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn

from pretrain.kernels.splitmix import UPPER, splitmix64, upper_bits

NAMES = frozenset({"drop_path", "drop_path1", "drop_path2"})  # in blocks of timm, transformers, InternImage


class DropPath(nn.Module):
    """Stochastic depth of one branch: each image's rows [b, ...] times zero with `probability`, else times more
    than one, so that the mean stays; nothing in eval mode. Source: arXiv 1603.09382.

    Shares come from `DropPaths.draw`; where that was given no keys, from torch's generator.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability  # in [0, 1)
        self.drawn: Float[Tensor, " b"] | None = None

    def share(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"] | None:
        """What multiplies each image's branch, in float32, where 1 / keep is exact; None: nothing does."""
        if not self.training or not self.probability:
            return None
        if self.drawn is not None:
            return self.drawn
        keep = 1 - self.probability
        return torch.empty(len(x), device=x.device).bernoulli_(keep).div_(keep)

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        share = self.share(x)
        return x if share is None else x * share.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class DropPaths:
    """All DropPath modules of an encoder, in order, whose shares are drawn together.

    Shares stay until the next draw: a block that is computed again for the backward pass meets its own.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self._paths = [m for m in encoder.modules() if isinstance(m, DropPath) and m.probability]
        # A plain tensor: as a buffer it would be cast with the parameters, and averaged by the teacher.
        self._thresholds = torch.empty(0, 1, dtype=torch.long)

    def draw(self, keys: Int[Tensor, " b"] | None) -> None:
        """Shares for the images with these keys, without a wait for the device; None: torch's generator draws."""
        rows = [None] * len(self._paths) if keys is None or not self._paths else self._shares(keys).unbind()
        for path, row in zip(self._paths, rows, strict=True):
            path.drawn = row

    def _shares(self, keys: Int[Tensor, " b"]) -> Float[Tensor, "branches b"]:
        if self._thresholds.device != keys.device or not len(self._thresholds):
            kept = [[round((1 - path.probability) * 2**UPPER)] for path in self._paths]
            self._thresholds = torch.tensor(kept, device=keys.device)
        branches = torch.arange(len(self._paths), device=keys.device)[:, None]
        drawn = upper_bits(splitmix64(keys + splitmix64(branches)))
        return (drawn < self._thresholds) * (2**UPPER / self._thresholds.double()).float()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Modules of a model that have a place for a DropPath, whether they drop branches or not."""
    return [m for m in model.modules() if any(name in NAMES for name, _ in m.named_children())]


def set_linear(model: nn.Module, last: float) -> int:
    """Number of blocks of a model, by others too, that got DropPaths: of probabilities that rise from 0 to `last`.

    Those that have a place for them (NAMES), whether they dropped branches before or not, in the order of their
    modules, as timm and transformers count.
    """
    blocks = blocks_of(model)
    for number, block in enumerate(blocks):
        probability = last * number / max(len(blocks) - 1, 1)
        for name in NAMES & dict(block.named_children()).keys():
            setattr(block, name, DropPath(probability))
    return len(blocks)


def replace_timm(model: nn.Module) -> None:
    """Puts DropPath in the place of timm's, with the same probabilities."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TimmDropPath):
                setattr(module, name, DropPath(child.drop_prob))
