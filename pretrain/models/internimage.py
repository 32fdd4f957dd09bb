"""How does InternImage turn images into stage maps, tokens and logits?

Channels come last: every map is [b, h, w, c]. Module names are those of the published checkpoints. A
parameter is used in the forward of the module that owns it and nowhere else, so that ZeRO-3 can gather it.
Source: "InternImage" (arXiv 2211.05778).
"""

from __future__ import annotations

from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.models.activations import CHECKPOINTS, RunBlock, keep_all
from pretrain.models.internimage_block import Block, ChannelsFirst, ChannelsLast, Norm
from pretrain.models.internimage_config import INTERNIMAGE, LEVEL2, InternImageConfig
from pretrain.models.pooling import AttentionPool, init_linear_and_norm

__all__ = ["INTERNIMAGE", "InternImage", "InternImageClassifier", "InternImageConfig", "StrideTokens"]

CONV_HEAD_RATIO = 1.5  # published: width of the average-pooling head / width of the last stage
TOKEN_WIDTH = 1024  # published: width of the stride-16 tokens of H and G
POOLED_WIDTH = 768  # published: output of the attention pooling of H and G
POOL_HEADS = 16  # published: heads of the attention pooling of H and G


class InternImage(nn.Module):
    """The backbone alone: images [b, 3, h, w] -> maps [b, h_i, w_i, c_i], one a stage.

    Images come in the dtype of the parameters. h_i = ceil(h / stride_i); each map has passed its stage's own
    norm. `activation_checkpoint` is a key of pretrain.models.activations.CHECKPOINTS.
    """

    def __init__(self, config: InternImageConfig, *, activation_checkpoint: str = "none"):
        super().__init__()
        self.config = config
        if activation_checkpoint not in CHECKPOINTS:
            raise ValueError(
                f"activation_checkpoint={activation_checkpoint!r} is unknown; choose from {sorted(CHECKPOINTS)}"
            )
        run = CHECKPOINTS[activation_checkpoint]
        self.patch_embed = Stem(config.channels)
        drop_paths = iter(config.drop_paths)
        self.levels = nn.ModuleList(
            Stage(config, index, tuple(islice(drop_paths, depth)), run)
            for index, depth in enumerate(config.depths)
        )
        self.apply(init_linear_and_norm)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        return stage_maps(self.patch_embed, self.levels, images)


class StrideTokens(nn.Module):
    """One token grid from the last two stages: 1x1(second last) + PixelShuffle(1x1(last)).

    Stage maps, as InternImage returns them -> tokens [b, h, w, width] on the grid of the second-last stage:
    stride 16 for four stages (published, width 1024), stride 8 for three. Raises ValueError unless that
    grid is twice the last one, i.e. the image's sides are multiples of the last stage's stride.

    The four tokens that one position of the last stage becomes start with equal weights, so that no
    checkerboard stands in the targets of images. Source: ICNR (arXiv 1707.02937).
    """

    def __init__(self, config: InternImageConfig, width: int = TOKEN_WIDTH):
        super().__init__()
        self.width = width
        self.stride = config.strides[-2]
        self.dcnv3_head_x4 = nn.Sequential(nn.Conv2d(config.widths[-1], width * 4, 1), nn.PixelShuffle(2))
        self.dcnv3_head_x3 = nn.Conv2d(config.widths[-2], width, 1)
        self.apply(init_linear_and_norm)
        self.dcnv3_head_x4.apply(_init_shuffled)

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b gh gw d"]:
        return stride_tokens(self.dcnv3_head_x3, self.dcnv3_head_x4, maps)


def _init_shuffled(module: nn.Module) -> None:
    """Equal rows for the four outputs that PixelShuffle(2) makes of one; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d):
        with torch.no_grad():
            for parameter in (module.weight, module.bias):
                parameter.copy_(parameter[::4].repeat_interleave(4, dim=0))


class InternImageClassifier(nn.Module):
    """Backbone and published head under the flat published names: images [b, 3, h, w] -> logits [b, classes].

    T to XL: 1x1 convolution, BatchNorm, GELU, average pool, linear. H and G (`use_clip_projector`): stride
    tokens, attention pooling, LayerNorm, linear.
    """

    def __init__(self, config: InternImageConfig, num_classes: int, *, activation_checkpoint: str = "none"):
        super().__init__()
        self.config = config
        backbone = InternImage(config, activation_checkpoint=activation_checkpoint)
        self.patch_embed, self.levels = backbone.patch_embed, backbone.levels
        if config.use_clip_projector:
            heads = StrideTokens(config)
            self.dcnv3_head_x4, self.dcnv3_head_x3 = heads.dcnv3_head_x4, heads.dcnv3_head_x3
            self.clip_projector = AttentionPool(TOKEN_WIDTH, POOLED_WIDTH, POOL_HEADS)
            self.fc_norm = nn.Sequential(Norm(POOLED_WIDTH))
            width = POOLED_WIDTH
        else:
            width = int(config.widths[-1] * CONV_HEAD_RATIO)
            convolution = nn.Conv2d(config.widths[-1], width, 1, bias=False)
            self.conv_head = nn.Sequential(convolution, nn.Sequential(nn.BatchNorm2d(width)), nn.GELU())
        self.head = nn.Linear(width, num_classes)
        self.head.apply(init_linear_and_norm)

    def features(self, maps: list[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b d"]:
        """Stage maps -> the global vector [b, d] that the linear head classifies."""
        if self.config.use_clip_projector:
            tokens = stride_tokens(self.dcnv3_head_x3, self.dcnv3_head_x4, maps)
            return self.fc_norm(self.clip_projector(tokens.flatten(1, 2)))
        return self.conv_head(maps[-1].permute(0, 3, 1, 2)).mean((2, 3))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        return self.head(self.features(stage_maps(self.patch_embed, self.levels, images)))


def stage_maps(
    stem: nn.Module, stages: nn.ModuleList, images: Float[Tensor, "b 3 h w"]
) -> list[Float[Tensor, "b _ _ _"]]:
    """Runs the stages and keeps the map of each before it is downsampled."""
    x = stem(images)
    maps = []
    for stage in stages:
        stage_map, x = stage(x)
        maps.append(stage_map)
    return maps


def stride_tokens(
    head_x3: nn.Module, head_x4: nn.Module, maps: list[Float[Tensor, "b _ _ _"]]
) -> Float[Tensor, "b gh gw d"]:
    """1x1(second-last map) + PixelShuffle(1x1(last map)), channels last."""
    fine, coarse = maps[-2], maps[-1]
    if (fine.shape[1], fine.shape[2]) != (2 * coarse.shape[1], 2 * coarse.shape[2]):
        raise ValueError(
            f"the last two stage maps are {tuple(fine.shape[1:3])} and {tuple(coarse.shape[1:3])} positions, "
            "but the token grid needs the first to be twice the second: use image sides that are multiples "
            "of the last stage's stride"
        )
    tokens = head_x3(fine.permute(0, 3, 1, 2)) + head_x4(coarse.permute(0, 3, 1, 2))
    return tokens.permute(0, 2, 3, 1)


class Stem(nn.Module):
    """Images [b, 3, h, w] -> [b, h / 4, w / 4, channels]: two 3x3 stride-2 convolutions, LayerNorms, GELU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(ChannelsLast(), Norm(channels // 2), ChannelsFirst())
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(ChannelsLast(), Norm(channels))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h4 w4 c"]:
        images = images.contiguous(memory_format=torch.channels_last)
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(images)))))


class Stage(nn.Module):
    """Blocks on one map size: [b, h, w, c] -> its map, and the next stage's input (None after the last)."""

    def __init__(
        self, config: InternImageConfig, index: int, drop_paths: tuple[float, ...], run: RunBlock = keep_all
    ):
        super().__init__()
        width = config.widths[index]
        self.blocks = nn.ModuleList(Block(config, index, drop_path, run) for drop_path in drop_paths)
        self.norm = nn.Sequential(Norm(width)) if config.has_stage_norm else None
        self.post_norm_ids = config.level2_post_norm_block_ids if index == LEVEL2 else ()
        if self.post_norm_ids:
            self.post_norms = nn.ModuleList(nn.Sequential(Norm(width)) for _ in self.post_norm_ids)
        self.downsample = Downsample(width) if index < config.num_stages - 1 else None

    def forward(
        self, x: Float[Tensor, "b h w c"]
    ) -> tuple[Float[Tensor, "b h w c"], Float[Tensor, "b h2 w2 c2"] | None]:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.post_norm_ids:
                x = self.post_norms[self.post_norm_ids.index(index)](x)
        if self.norm is not None:
            x = self.norm(x)
        return x, None if self.downsample is None else self.downsample(x)


class Downsample(nn.Module):
    """[b, h, w, c] -> [b, ceil(h / 2), ceil(w / 2), 2 c]: 3x3 convolution without bias, LayerNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(ChannelsLast(), Norm(2 * width))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))
