"""Which maps of several strides does a backbone give to heads that find and outline things? (torch alone)

Backbones with stages give theirs; a plain one gets a simple feature pyramid, arXiv 2203.16527 (ViTDet), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

SCALES = (4.0, 2.0, 1.0, 0.5)  # of the maps that are made of one, as in the paper
EPS = 1e-6  # of the norms


@dataclass(frozen=True)
class Stages:
    """What an encoder's `maps` are, from fine to coarse."""

    widths: tuple[int, ...]
    strides: tuple[int, ...]  # pixels along one side of a position
    wants_norm: tuple[bool, ...]  # has passed no norm of its own, so that heads get it through a new one


class Pyramid(nn.Module):
    """Images [b, 3, h, w], normalised, in the parameters' dtype -> maps [b, widths[i], h / s, w / s], s = strides[i].

    h and w are multiples of strides[-1], else ValueError. `width` is that of the maps made for an encoder of one
    stage; several stages keep theirs.
    """

    def __init__(self, encoder: nn.Module, width: int = 256) -> None:
        super().__init__()
        self.encoder = encoder
        stages: Stages = encoder.stages
        if len(stages.widths) == 1:
            self.neck: nn.Module = SimpleFeaturePyramid(stages.widths[0], width)
            self.widths = (width,) * len(SCALES)
        else:
            self.neck = StageNorms(stages)
            self.widths = stages.widths
        self.strides = strides_of(stages)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        height, width = images.shape[2:]
        if height % self.strides[-1] or width % self.strides[-1]:
            raise ValueError(
                f"images of {height} x {width} pixels: both sides must be multiples of {self.strides[-1]}, the "
                "coarsest stride of the pyramid: pad them"
            )
        return self.neck(self.encoder.maps(images))


def strides_of(stages: Stages) -> tuple[int, ...]:
    """Pixels along one side of a position of each map of the pyramid."""
    if len(stages.strides) > 1:
        return stages.strides
    return tuple(round(stages.strides[0] / scale) for scale in SCALES)


class SimpleFeaturePyramid(nn.Module):
    """One map [b, d, h, w] -> maps of `width` at SCALES of its grid; h and w are even.

    Deconvolutions and max pooling change the grid, then a 1x1 and a 3x3 convolution, each with a norm.
    """

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        finest = nn.Sequential(_double(d, d // 2), ChannelNorm(d // 2), nn.GELU(), _double(d // 2, d // 4))
        resize = (finest, _double(d, d // 2), nn.Identity(), nn.MaxPool2d(2))
        widths = (d // 4, d // 2, d, d)
        self.levels = nn.ModuleList(
            nn.Sequential(change, *_project(into, width)) for change, into in zip(resize, widths, strict=True)
        )

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]]) -> list[Float[Tensor, "b _ _ _"]]:
        (single,) = maps
        return [level(single) for level in self.levels]


class StageNorms(nn.Module):
    """A new norm for each map that has passed none; the others stay."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            ChannelNorm(width) if wants else nn.Identity()
            for width, wants in zip(stages.widths, stages.wants_norm, strict=True)
        )

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]]) -> list[Float[Tensor, "b _ _ _"]]:
        return [norm(single) for norm, single in zip(self.norms, maps, strict=True)]


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each position: [b, c, h, w] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _double(into: int, out: int) -> nn.Module:
    return nn.ConvTranspose2d(into, out, 2, stride=2)


def _project(into: int, width: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(into, width, 1, bias=False),
        ChannelNorm(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        ChannelNorm(width),
    )
