"""What does one block of InternImage compute on a channels-last map?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.kernels.dcnv3 import dcnv3
from pretrain.models.internimage_config import InternImageConfig

DCN_KERNEL = 3  # side of the sampling grid in every published size


class Block(nn.Module):
    """Two residual branches, DCNv3 and MLP, on [b, h, w, c].

    pre-norm      x + gamma f(norm(x))          (T; gamma when layer_scale is set)
    post-norm     x + gamma norm(f(x))          (S, B, L, XL, G)
    res-post-norm x + norm'(f(norm(x)))         (H)
    """

    def __init__(self, config: InternImageConfig, stage: int, drop_path: float):
        super().__init__()
        width = config.widths[stage]
        self.post_norm = config.post_norm
        self.res_post_norm = config.res_post_norm
        self.layer_scale = config.layer_scale
        self.drop_path = drop_path
        self.norm1 = nn.Sequential(layer_norm(width))
        self.dcn = DCNv3(config, stage)
        self.norm2 = nn.Sequential(layer_norm(width))
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        if config.res_post_norm:
            self.res_post_norm1 = nn.Sequential(layer_norm(width))
            self.res_post_norm2 = nn.Sequential(layer_norm(width))
        if config.layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((width,), config.layer_scale))
            self.gamma2 = nn.Parameter(torch.full((width,), config.layer_scale))

    def reset_parameters(self) -> None:
        if self.layer_scale is not None:
            nn.init.constant_(self.gamma1, self.layer_scale)
            nn.init.constant_(self.gamma2, self.layer_scale)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        branch1 = self._branch(x, self.dcn, self.norm1, "res_post_norm1")
        x = x + self._drop(branch1 if self.layer_scale is None else self.gamma1 * branch1)
        branch2 = self._branch(x, self.mlp, self.norm2, "res_post_norm2")
        return x + self._drop(branch2 if self.layer_scale is None else self.gamma2 * branch2)

    def _branch(
        self, x: Float[Tensor, "b h w c"], function: nn.Module, norm: nn.Module, outer: str
    ) -> Float[Tensor, "b h w c"]:
        if self.post_norm:
            return norm(function(x))
        y = function(norm(x))
        return getattr(self, outer)(y) if self.res_post_norm else y

    def _drop(self, branch: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return _drop_path(branch, self.drop_path) if self.training and self.drop_path else branch


class DCNv3(nn.Module):
    """Deformable convolution whose offsets and masks are predicted from a depth-wise convolution.

    [b, h, w, c] -> [b, h, w, c]. The mask's softmax runs in float32, whatever the dtype of the parameters.
    """

    def __init__(self, config: InternImageConfig, stage: int):
        super().__init__()
        width, self.groups = config.widths[stage], config.groups[stage]
        self.offset_scale = config.offset_scale
        self.remove_center = config.remove_center
        self.center_feature_scale = config.center_feature_scale
        points = DCN_KERNEL**2 - config.remove_center
        size = config.dw_kernel_size
        depthwise = nn.Conv2d(width, width, size, padding=(size - 1) // 2, groups=width)
        self.dw_conv = nn.Sequential(depthwise, nn.Sequential(ChannelsLast(), layer_norm(width)), nn.GELU())
        self.offset = nn.Linear(width, self.groups * points * 2)
        self.mask = nn.Linear(width, self.groups * points)
        self.input_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        if config.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(self.groups, width))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(self.groups))

    def reset_parameters(self) -> None:
        """Every point starts on the regular grid with equal weight; projections start Xavier-uniform."""
        for projection in (self.offset, self.mask):
            projection.apply(_init_zero)
        for projection in (self.input_proj, self.output_proj):
            projection.apply(_init_xavier)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        value = self.input_proj(x)
        guide = self.dw_conv(x.permute(0, 3, 1, 2))
        logits = self.mask(guide).unflatten(-1, (self.groups, -1))
        sampled = dcnv3(
            value,
            self.offset(guide),
            F.softmax(logits, -1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype).flatten(-2),
            kernel_size=DCN_KERNEL,
            padding=DCN_KERNEL // 2,
            groups=self.groups,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
        )
        if self.center_feature_scale:
            weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            scale = F.linear(guide, weight, bias).sigmoid()[..., None]
            blended = torch.lerp(
                sampled.unflatten(-1, (self.groups, -1)), value.unflatten(-1, (self.groups, -1)), scale
            )
            sampled = blended.flatten(-2)
        return self.output_proj(sampled)


class Mlp(nn.Module):
    """Linear, GELU, Linear on the last axis."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.fc2(self.act(self.fc1(x)))


class ChannelsLast(nn.Module):
    """[b, c, h, w] -> [b, h, w, c]."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w c"]:
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """[b, h, w, c] -> [b, c, h, w]."""

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
        return x.permute(0, 3, 1, 2)


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


def _init_zero(linear: nn.Module) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def _init_xavier(linear: nn.Module) -> None:
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)


def _drop_path(branch: Float[Tensor, "b h w c"], rate: float) -> Float[Tensor, "b h w c"]:
    """Stochastic depth: zero for an image with probability `rate`, else scaled so that the mean stays."""
    keep = 1 - rate
    return branch * branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)
