"""How does an image become one grid of tokens, whatever the backbone?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Protocol

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.config import Backbone
from pretrain.models import internimage_block
from pretrain.models.activations import CHECKPOINTS
from pretrain.models.feature_norm import FEATURE_NORMS, FeatureNorm
from pretrain.models.internimage import InternImage, StrideTokens
from pretrain.models.internimage_config import INTERNIMAGE


class Encoder(Protocol):
    """Images [b, 3, s, s], normalised, in the parameters' dtype -> tokens [b, l, width], row by row."""

    width: int
    stride: int  # pixels along one side of a token

    def __call__(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b l d"]: ...

    def fold_norm(self) -> None: ...


class InternImageEncoder(nn.Module):
    """InternImage and its token head; parameter names are those of the released pre-training checkpoints."""

    def __init__(self, backbone: Backbone, image_size: int) -> None:
        super().__init__()
        size = _entry(INTERNIMAGE, backbone)
        config = dataclasses.replace(
            size, drop_path_rate=backbone.drop_path, drop_path_type=backbone.drop_path_schedule
        )
        self.dcnv3 = InternImage(config, activation_checkpoint=backbone.activation_checkpoint)
        self.heads = StrideTokens(config, backbone.token_width)
        self.norm = FEATURE_NORMS[backbone.token_norm](backbone.token_width)
        self.width, self.stride = backbone.token_width, self.heads.stride
        if image_size % config.strides[-1]:
            raise ValueError(
                f"views.size={image_size} must be a multiple of {config.strides[-1]}, "
                f"the stride of the last stage of {backbone.size}"
            )

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b l d"]:
        return self.norm(self.heads(self.dcnv3(images)).flatten(1, 2))

    def fold_norm(self) -> None:
        """Hands what FeatureNorm does in eval mode to the two 1x1 convolutions before it; outputs stay."""
        if isinstance(self.norm, FeatureNorm):
            self.norm.fold_into(self.heads.dcnv3_head_x3, self.heads.dcnv3_head_x4[0])
            self.norm = nn.Identity()


@dataclasses.dataclass(frozen=True)
class ViTSize:
    width: int
    depth: int
    heads: int
    patch: int = 16  # pixels


# ViT (arXiv 2010.11929), table 1; `tiny` is for tests.
VIT: dict[str, ViTSize] = {
    "vit_tiny": ViTSize(48, 2, 4),
    "vit_s16": ViTSize(384, 12, 6),
    "vit_b16": ViTSize(768, 12, 12),
    "vit_l16": ViTSize(1024, 24, 16),
}


class ViTEncoder(nn.Module):
    """timm's VisionTransformer with class token; returns the patch tokens after the last norm."""

    def __init__(self, backbone: Backbone, image_size: int) -> None:
        super().__init__()
        size = _entry(VIT, backbone)
        if backbone.drop_path and backbone.drop_path_schedule != "linear":
            raise ValueError(
                f"backbone.drop_path_schedule={backbone.drop_path_schedule!r}: timm's ViT knows 'linear' only"
            )
        self.vit = VisionTransformer(
            img_size=image_size,
            patch_size=size.patch,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            num_classes=0,
            global_pool="",
            drop_path_rate=backbone.drop_path,
            dynamic_img_size=True,
        )
        for block in self.vit.blocks:
            block.forward = partial(CHECKPOINTS[backbone.activation_checkpoint], block.forward)
        self.norm = FEATURE_NORMS[backbone.token_norm](size.width)
        self.width, self.stride = size.width, size.patch

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b l d"]:
        return self.norm(self.vit(images)[:, self.vit.num_prefix_tokens :])

    def fold_norm(self) -> None:
        """Hands what FeatureNorm does in eval mode to ViT's last LayerNorm; the patch tokens stay."""
        if isinstance(self.norm, FeatureNorm):
            self.norm.fold_into(self.vit.norm)
            self.norm = nn.Identity()


# ZeRO-3 gathers each of these whole. Only what a step calls once: DeepSpeed reduces their gradients at every call's
# end, and the decoder, made of timm's blocks as ViT is, is called for every dense target.
GATHER_UNITS = (internimage_block.Block,)

BACKBONES: dict[str, Callable[[Backbone, int], nn.Module]] = {
    "internimage": InternImageEncoder,
    "vit": ViTEncoder,
}


def build_encoder(backbone: Backbone, image_size: int) -> nn.Module:
    """The Encoder that a recipe names, freshly initialised; ValueError lists the choices."""
    if backbone.family not in BACKBONES:
        raise ValueError(f"backbone.family={backbone.family!r} is unknown; choose from {sorted(BACKBONES)}")
    return BACKBONES[backbone.family](backbone, image_size)


def _entry(table: dict, backbone: Backbone):
    if backbone.size not in table:
        raise ValueError(f"backbone.size={backbone.size!r} is unknown; choose from {sorted(table)}")
    return table[backbone.size]
