"""How does an image become one grid of tokens, whatever the backbone?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor, nn

from pretrain.config import Backbone
from pretrain.models import internimage_block
from pretrain.models.drop_path import DropPaths
from pretrain.models.feature_norm import FEATURE_NORMS, FeatureNorm
from pretrain.models.internimage import InternImage, StrideTokens
from pretrain.models.internimage_config import INTERNIMAGE, InternImageConfig
from pretrain.models.pooling import prepend_mean
from pretrain.models.pyramid import Stages
from pretrain.models.timm_encoders import SWIN, VIT, SwinEncoder, ViTEncoder


class Encoder(Protocol):
    """Images [b, 3, s, s], normalised, in the parameters' dtype -> tokens [b, l, width], row by row.

    With `summary` [b, 1 + l, width]: the image's own vector comes first, the class token where there is one, else
    the mean of the tokens. That is `finish(features(images), summary)`: features of an image depend on it alone,
    and on its key, which decides the branches that it drops in training (None: torch's generator does); finishing
    them may standardise over all images of all ranks.
    """

    width: int
    stride: int  # pixels along one side of a token
    patch: int  # pixels along one side of what the first layer embeds as one; InternImage, which overlaps: stride
    stages: Stages  # of `maps`

    def __call__(self, images: Float[Tensor, "b 3 s s"], summary: bool = False) -> Float[Tensor, "b n d"]: ...

    def features(
        self, images: Float[Tensor, "b 3 s s"], keys: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b m d"]: ...

    def finish(self, features: Float[Tensor, "b m d"], summary: bool) -> Float[Tensor, "b n d"]: ...

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]: ...

    def fold_norm(self) -> None: ...


class InternImageEncoder(nn.Module):
    """InternImage and its token head; parameter names are those of the released pre-training checkpoints."""

    def __init__(self, size: InternImageConfig, backbone: Backbone, image_size: int) -> None:
        super().__init__()
        config = replace(size, drop_path_rate=backbone.drop_path, drop_path_type=backbone.drop_path_schedule)
        self.dcnv3 = InternImage(config, activation_checkpoint=backbone.activation_checkpoint)
        self.heads = StrideTokens(config, backbone.token_width)
        self.norm = FEATURE_NORMS[backbone.token_norm](backbone.token_width)
        self.drop_paths = DropPaths(self)
        self.width, self.stride, self.patch = backbone.token_width, self.heads.stride, self.heads.stride
        self.stages = Stages(config.widths, config.strides, (False,) * config.num_stages)
        if image_size % config.strides[-1]:
            raise ValueError(
                f"views.size={image_size} must be a multiple of {config.strides[-1]}, "
                f"the stride of the last stage of {backbone.size}"
            )

    def forward(self, images: Float[Tensor, "b 3 s s"], summary: bool = False) -> Float[Tensor, "b n d"]:
        return self.finish(self.features(images), summary)

    def features(
        self, images: Float[Tensor, "b 3 s s"], keys: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b l d"]:
        self.drop_paths.draw(keys)
        return self.heads(self.dcnv3(images)).flatten(1, 2)

    def finish(self, features: Float[Tensor, "b l d"], summary: bool) -> Float[Tensor, "b n d"]:
        tokens = self.norm(features)
        return prepend_mean(tokens) if summary else tokens

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """As published for detection: each stage after its own norm, where it has one."""
        self.drop_paths.draw(None)
        return [stage.permute(0, 3, 1, 2) for stage in self.dcnv3(images)]

    def fold_norm(self) -> None:
        """Hands what FeatureNorm does in eval mode to the two 1x1 convolutions before it; outputs stay."""
        if isinstance(self.norm, FeatureNorm):
            self.norm.fold_into(self.heads.dcnv3_head_x3, self.heads.dcnv3_head_x4[0])
            self.norm = nn.Identity()


# ZeRO-3 gathers each of these whole. Only what a step calls once: DeepSpeed reduces their gradients at every call's
# end, and the decoder, made of timm's blocks as ViT is, is called for every dense target.
GATHER_UNITS = (internimage_block.Block,)


@dataclass(frozen=True)
class Family:
    """Backbones that differ in size only."""

    sizes: dict[str, Any]  # name -> what `encoder` takes first
    encoder: Callable[[Any, Backbone, int], nn.Module]


BACKBONES: dict[str, Family] = {
    "internimage": Family(INTERNIMAGE, InternImageEncoder),
    "swin": Family(SWIN, SwinEncoder),
    "vit": Family(VIT, ViTEncoder),
}


def build_encoder(backbone: Backbone, image_size: int) -> nn.Module:
    """The Encoder that a recipe names, freshly initialised; ValueError lists the choices."""
    if backbone.family not in BACKBONES:
        raise ValueError(f"backbone.family={backbone.family!r} is unknown; choose from {sorted(BACKBONES)}")
    family = BACKBONES[backbone.family]
    if backbone.size not in family.sizes:
        raise ValueError(f"backbone.size={backbone.size!r} is unknown; choose from {sorted(family.sizes)}")
    return family.encoder(family.sizes[backbone.size], backbone, image_size)
