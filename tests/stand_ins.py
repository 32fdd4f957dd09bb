"""Who plays the guide and the teacher where a test has none?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pretrain.models.guides import Guide
from pretrain.targets import TargetEncoders, TeacherCall
from tests.fakes import FACTS


class StandInGuide(Guide):
    """Features of a patch: a fixed mixture of its mean colours; the summary is their mean."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.width, self.patch, self.num_codes, self.sha256 = (
            FACTS.guide_width,
            16,
            FACTS.guide_codes,
            "0" * 64,
        )
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("mix", torch.randn(3, self.width, generator=generator))
        self.register_buffer("codebook", torch.randn(self.num_codes, self.width, generator=generator))

    def forward(self, views: Tensor, grid: int) -> Float[Tensor, "n m d"]:
        colours = F.adaptive_avg_pool2d(views.float() / 255 - 0.5, grid).flatten(2).transpose(1, 2)
        tokens = colours @ self.mix.float()
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)

    def codes(self, views: Tensor, grid: int) -> Int[Tensor, "n l"]:
        return (self(views, grid)[:, 1:] @ self.codebook.float().T).argmax(dim=-1)


def encoders(teacher: TeacherCall) -> TargetEncoders:
    """The teacher, and a guide beside it for the targets that ask for one."""
    return TargetEncoders(teacher, StandInGuide())


def says(tokens: Tensor) -> TargetEncoders:
    """A teacher that says the same tokens whatever it sees."""
    return encoders(lambda images, kinds, summary: {"dense": tokens})
