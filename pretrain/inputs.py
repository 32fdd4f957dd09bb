"""What does the student see of a batch, and which of its tokens show which image?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pretrain.data.batch import Batch
from pretrain.kernels.splitmix import splitmix64
from pretrain.objective import Input, Objective, Target


@dataclass(frozen=True)
class Encoded:
    """A batch and what the student makes of it; tokens by the side of the loss balance that reads them."""

    batch: Batch
    tokens: dict[str, Float[Tensor, "b l d"]]  # an image's patches, as its input shows them
    summary: dict[str, Float[Tensor, "b d"]]  # empty where no target asks for it
    owned: Bool[Tensor, "b l"]  # tokens that show the image


class MaskPatch(nn.Module):
    """What the hidden patches of a masked input show: one learned patch, for every backbone alike.

    `patch` is what the first layer embeds as one. A linear patch embedding turns it into one learned vector: the
    mask token of BEiT (arXiv 2106.08254) and SimMIM (arXiv 2111.09886).
    """

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.pixels = nn.Parameter(torch.zeros(3, patch, patch))  # the mean colour

    def forward(
        self, images: Float[Tensor, "b 3 s s"], hidden: Bool[Tensor, "b 1 s s"]
    ) -> Float[Tensor, "b 3 s s"]:
        repeats = images.shape[-1] // self.pixels.shape[-1]
        return torch.where(hidden, self.pixels.repeat(1, repeats, repeats), images)


def enlarge(mask: Bool[Tensor, "i g g"], factor: int) -> Bool[Tensor, "i h h"]:
    """The mask with every square as factor x factor places: of pixels, or of tokens."""
    return mask.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def owned_tokens(input: Input, mask: Bool[Tensor, "i g g"], tokens_a_side: int) -> Bool[Tensor, "b l"]:
    """For each image, the tokens of its input that show it; a square of the mask has `tokens_a_side` squared."""
    hidden = enlarge(mask, tokens_a_side).flatten(1)
    return ~hidden if input.mixed == 1 else torch.stack([~hidden, hidden], dim=1).flatten(0, 1)


def input_keys(input: Input, batch: Batch, seed: int) -> Int[Tensor, " i"]:
    """A pseudo-random number an input, int64: of the run's seed, its first image's place in the run's order and its
    view, so that ranks and micro-batches may divide a batch as they like.
    """
    position = batch.position[:: input.mixed]
    view = torch.arange(len(position), device=position.device) % input.views
    return splitmix64(splitmix64(position * input.views + view) + seed)


def owned_places(owned: Bool[Tensor, "n l"], num_owned: int) -> Int[Tensor, "n k"]:
    """Indices of the owned tokens of each image in grid order; every row owns `num_owned`."""
    return (~owned).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_owned]


def rows_of(objective: Objective, target: Target, batch: Batch) -> Int[Tensor, " n"]:
    """Indices in the batch of the images that a target is about."""
    mixed = objective.input.mixed
    index = torch.arange(len(batch.views), device=batch.views.device)
    return torch.cat([index[slot::mixed] for slot in objective.slots(target)])


def view_of(objective: Objective, target: Target, batch: Batch) -> Tensor:
    """The views that a target encodes, uint8 [n, 3, s, s]."""
    return batch.views[rows_of(objective, target, batch), int(target.view == "other")]
