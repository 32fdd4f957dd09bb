"""How do timm's ViT and Swin become encoders of ours? Their own modules and parameter names, tokens row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.config import Backbone
from pretrain.models.activations import CHECKPOINTS
from pretrain.models.drop_path import DropPaths, replace_timm
from pretrain.models.feature_norm import FEATURE_NORMS, FeatureNorm
from pretrain.models.pooling import prepend_mean
from pretrain.models.pyramid import Stages


@dataclass(frozen=True)
class ViTSize:
    width: int
    depth: int
    heads: int
    patch: int = 16  # pixels

    @property
    def arguments(self) -> dict[str, Any]:
        """What timm's VisionTransformer takes, here and in the config.json of an export."""
        return {
            "patch_size": self.patch,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "fc_norm": False,  # the norm stands before pooling, under the name `norm`
            "dynamic_img_size": True,
        }


# ViT (arXiv 2010.11929), table 1; `tiny` is for tests.
VIT: dict[str, ViTSize] = {
    "vit_tiny": ViTSize(48, 2, 4),
    "vit_s16": ViTSize(384, 12, 6),
    "vit_b16": ViTSize(768, 12, 12),
    "vit_l16": ViTSize(1024, 24, 16),
}


@dataclass(frozen=True)
class SwinSize:
    embed: int  # width of the first stage; every further stage is twice as wide and half as fine
    depths: tuple[int, ...]  # blocks of each stage
    heads: tuple[int, ...]  # of each stage
    window: int = 7  # tokens, side of what attends to itself
    patch: int = 4  # pixels

    @property
    def width(self) -> int:
        return self.embed * 2 ** (len(self.depths) - 1)

    @property
    def stride(self) -> int:
        return self.patch * 2 ** (len(self.depths) - 1)

    @property
    def arguments(self) -> dict[str, Any]:
        """What timm's SwinTransformer takes, here and in the config.json of an export."""
        return {
            "patch_size": self.patch,
            "embed_dim": self.embed,
            "depths": self.depths,
            "num_heads": self.heads,
            "window_size": self.window,
            "always_partition": False,  # True shifts windows in the last stage, where pretrained models have one
            "strict_img_size": False,  # masks of shifted windows are made for each input: any size, same numbers
        }


# Swin (arXiv 2103.14030), section 3.3; heads are 32 wide. `tiny` is for tests: at 64 px its windows shift too.
SWIN: dict[str, SwinSize] = {
    "swin_tiny": SwinSize(8, (2, 1, 1, 1), (1, 2, 4, 8), window=4),
    "swin_t": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32)),
}


class ViTEncoder(nn.Module):
    """timm's VisionTransformer with class token, which is the summary; tokens after the last norm."""

    def __init__(self, size: ViTSize, backbone: Backbone, image_size: int) -> None:
        super().__init__()
        _require_linear(backbone)
        self.vit = VisionTransformer(
            img_size=image_size,
            num_classes=0,
            global_pool="",
            drop_path_rate=backbone.drop_path,
            **size.arguments,
        )
        replace_timm(self.vit)
        self.drop_paths = DropPaths(self.vit)
        _checkpoint(self.vit.blocks, backbone)
        self.norm = FEATURE_NORMS[backbone.token_norm](size.width)
        self.width, self.stride, self.patch = size.width, size.patch, size.patch
        self.stages = Stages((size.width,), (size.patch,), (False,))

    def forward(self, images: Float[Tensor, "b 3 s s"], summary: bool = False) -> Float[Tensor, "b n d"]:
        return self.finish(self.features(images), summary)

    def features(
        self, images: Float[Tensor, "b 3 s s"], keys: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b m d"]:
        self.drop_paths.draw(keys)
        return self.vit(images)

    def finish(self, features: Float[Tensor, "b m d"], summary: bool) -> Float[Tensor, "b n d"]:
        return self.norm(features if summary else features[:, self.vit.num_prefix_tokens :])

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b d h16 w16"]]:
        """The grid of patch tokens after the last norm; every block attends to all of it."""
        self.drop_paths.draw(None)
        tokens = self.vit(images)[:, self.vit.num_prefix_tokens :]
        return [tokens.transpose(1, 2).unflatten(2, (-1, images.shape[3] // self.patch))]

    def fold_norm(self) -> None:
        """Hands what FeatureNorm does in eval mode to ViT's last LayerNorm; class and patch tokens stay."""
        if isinstance(self.norm, FeatureNorm):
            self.norm.fold_into(self.vit.norm)
            self.norm = nn.Identity()


class SwinEncoder(nn.Module):
    """timm's SwinTransformer; tokens of the last stage after the last norm, their mean as summary.

    At `image_size` it computes what timm's pretrained models do: a stage whose grid is no larger than a window
    has one window of the grid's size, unshifted. Images of another size keep these windows; grids are padded.
    """

    def __init__(self, size: SwinSize, backbone: Backbone, image_size: int) -> None:
        super().__init__()
        _require_linear(backbone)
        if image_size % size.stride:
            raise ValueError(
                f"views.size={image_size} must be a multiple of {size.stride}, the pixels along one side of a token "
                f"of {backbone.size}: set {max(round(image_size / size.stride), 1) * size.stride}"
            )
        self.swin = SwinTransformer(
            img_size=image_size,
            num_classes=0,
            global_pool="",
            drop_path_rate=backbone.drop_path,
            **size.arguments,
        )
        replace_timm(self.swin)
        self.drop_paths = DropPaths(self.swin)
        _checkpoint((block for stage in self.swin.layers for block in stage.blocks), backbone)
        self.norm = FEATURE_NORMS[backbone.token_norm](size.width)
        self.width, self.stride, self.patch = size.width, size.stride, size.patch
        count = len(size.depths)
        self.stages = Stages(
            tuple(size.embed * 2**i for i in range(count)),
            tuple(size.patch * 2**i for i in range(count)),
            (True,) * (count - 1) + (False,),
        )

    def forward(self, images: Float[Tensor, "b 3 s s"], summary: bool = False) -> Float[Tensor, "b n d"]:
        return self.finish(self.features(images), summary)

    def features(
        self, images: Float[Tensor, "b 3 s s"], keys: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b l d"]:
        self.drop_paths.draw(keys)
        return self.swin(images).flatten(1, 2)

    def finish(self, features: Float[Tensor, "b l d"], summary: bool) -> Float[Tensor, "b n d"]:
        tokens = self.norm(features)
        return prepend_mean(tokens) if summary else tokens

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Each stage before it is merged, the last one after the last norm."""
        self.drop_paths.draw(None)
        return self.swin.forward_intermediates(images, norm=True, intermediates_only=True)

    def fold_norm(self) -> None:
        """Hands what FeatureNorm does in eval mode to Swin's last LayerNorm; the tokens stay."""
        if isinstance(self.norm, FeatureNorm):
            self.norm.fold_into(self.swin.norm)
            self.norm = nn.Identity()


def _require_linear(backbone: Backbone) -> None:
    if backbone.drop_path and backbone.drop_path_schedule != "linear":
        raise ValueError(
            f"backbone.drop_path_schedule={backbone.drop_path_schedule!r}: timm's {backbone.family} knows 'linear' "
            "only: set that, or backbone.drop_path=0"
        )


def _checkpoint(blocks: Iterable[nn.Module], backbone: Backbone) -> None:
    for block in blocks:
        block.forward = partial(CHECKPOINTS[backbone.activation_checkpoint], block.forward)
