"""What does one block of InternImage compute on a channels-last map?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.kernels.dcnv3 import FUSED, dcnv3_blended, dcnv3_packed
from pretrain.kernels.dcnv3_choice import Call, choose_path
from pretrain.kernels.packed_row import COLUMNS, SCALE_LOGIT
from pretrain.kernels.pointwise import NORM_EPS, depthwise_norm_gelu, layer_norm, residual_norm, rows_linear
from pretrain.models.activations import RunBlock, keep_all
from pretrain.models.drop_path import DropPath
from pretrain.models.internimage_config import InternImageConfig

DCN_KERNEL = 3  # side of the sampling grid in every published size


class Block(nn.Module):
    """Two residual branches, DCNv3 and MLP, on [b, h, w, c].

    pre-norm      x + gamma f(norm(x))          (T; gamma when layer_scale is set)
    post-norm     x + gamma norm(f(x))          (S, B, L, XL, G)
    res-post-norm x + norm'(f(norm(x)))         (H)
    """

    def __init__(self, config: InternImageConfig, stage: int, drop_path: float, run: RunBlock = keep_all):
        super().__init__()
        width = config.widths[stage]
        self.run = run  # inside the module's own call, whose hooks under ZeRO-3 must not run twice
        self.post_norm = config.post_norm
        self.res_post_norm = config.res_post_norm
        self.layer_scale = config.layer_scale
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        self.norm1 = nn.Sequential(Norm(width))
        self.dcn = DCNv3(config, stage)
        self.norm2 = nn.Sequential(Norm(width))
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        if config.res_post_norm:
            self.res_post_norm1 = nn.Sequential(Norm(width))
            self.res_post_norm2 = nn.Sequential(Norm(width))
        for name in ("gamma1", "gamma2"):
            gamma = None if config.layer_scale is None else nn.Parameter(torch.empty(width))
            self.register_parameter(name, gamma)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.layer_scale is not None:
            nn.init.constant_(self.gamma1, self.layer_scale)
            nn.init.constant_(self.gamma2, self.layer_scale)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return self.run(self._compute, x)

    def _compute(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        outer1 = outer2 = following = None
        if self.post_norm:
            outer1, outer2 = self.norm1(None), self.norm2(None)
        else:
            following = self.norm2(None)
        if self.res_post_norm:
            outer1, outer2 = self.res_post_norm1(None), self.res_post_norm2(None)
        branch = self.dcn(x if self.post_norm else self.norm1(x))
        share = self.drop_path1.share(x)
        x, normed = residual_norm(
            x, branch, share=share, gamma=self.gamma1, outer=outer1, following=following
        )
        branch = self.mlp(x if self.post_norm else normed)
        return residual_norm(x, branch, share=self.drop_path2.share(x), gamma=self.gamma2, outer=outer2)[0]


class DCNv3(nn.Module):
    """Deformable convolution whose offsets and masks are predicted from a depth-wise convolution.

    [b, h, w, c] -> [b, h, w, c]. The mask's softmax runs in float32, whatever the dtype of the parameters.
    Where the fused kernels serve, offsets, mask logits and centre scale come out of one matrix product.
    """

    def __init__(self, config: InternImageConfig, stage: int):
        super().__init__()
        width, self.groups = config.widths[stage], config.groups[stage]
        self.offset_scale = config.offset_scale
        self.remove_center = config.remove_center
        self.center_feature_scale = config.center_feature_scale
        points = DCN_KERNEL**2 - config.remove_center
        size = config.dw_kernel_size
        # Lists, for the published names alone: convolution, norm and GELU are one step.
        norm = nn.ModuleList([nn.Identity(), Norm(width)])
        self.dw_conv = nn.ModuleList([DepthwiseNormGelu(width, size), norm])
        self.offset = GroupLinear(width, self.groups, points * 2)
        self.mask = GroupLinear(width, self.groups, points)
        self.input_proj = MapLinear(width, width)
        self.output_proj = MapLinear(width, width)
        if config.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(self.groups, width))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(self.groups))

    def reset_parameters(self) -> None:
        """Every point starts on the regular grid with equal weight; projections start Xavier-uniform."""
        for projection in (self.input_proj, self.output_proj):
            projection.apply(_init_xavier)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        value = self.input_proj(x)
        depthwise, (_, norm) = self.dw_conv
        guide = depthwise(x, norm(None))
        call = Call(
            value.device.type,
            value.dtype,
            value.shape[3] // self.groups,
            kernel_size=DCN_KERNEL,
            padding=DCN_KERNEL // 2,
            remove_center=self.remove_center,
        )
        sample = self._sample_packed if choose_path(call).path == FUSED else self._sample
        return self.output_proj(sample(value, guide))

    def _sample(
        self, value: Float[Tensor, "b h w c"], guide: Float[Tensor, "b h w c"]
    ) -> Float[Tensor, "b h w c"]:
        offset, logits = self.offset(guide), self.mask(guide)
        scale = None
        if self.center_feature_scale:
            weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            scale = map_linear(guide, weight, bias)
        return dcnv3_blended(
            value,
            offset,
            logits.unflatten(-1, (self.groups, -1)),
            scale,
            kernel_size=DCN_KERNEL,
            padding=DCN_KERNEL // 2,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
        )

    def _sample_packed(
        self, value: Float[Tensor, "b h w c"], guide: Float[Tensor, "b h w c"]
    ) -> Float[Tensor, "b h w c"]:
        """`_sample` from packed rows: the weights of three projections, put together, give a row a group.

        Each of the modules that own those weights lays a copy of them in front of what it is given, in its own
        forward. So no module touches another's parameters, ZeRO-3 gathers and releases each as it is used, in
        the backward pass too, and the published names stay. The copy costs c**2 numbers a block, kept until
        the backward pass: of InternImage-H 95 million, 1 % of what 64 images keep at 192 px.
        """
        weight = guide.new_zeros(self.groups, COLUMNS - SCALE_LOGIT, guide.shape[3])
        bias = guide.new_zeros(self.groups, COLUMNS - SCALE_LOGIT)
        if self.center_feature_scale:
            weight = torch.cat([self.center_feature_scale_proj_weight[:, None], weight[:, 1:]], dim=1)
            bias = torch.cat([self.center_feature_scale_proj_bias[:, None], bias[:, 1:]], dim=1)
        weight, bias = self.offset(*self.mask(weight, bias))
        packed = map_linear(guide, weight.flatten(0, 1), bias.flatten())
        return dcnv3_packed(
            value,
            packed.unflatten(-1, (self.groups, COLUMNS)),
            offset_scale=self.offset_scale,
            has_scale=self.center_feature_scale,
            path=FUSED,
        )


class GroupLinear(nn.Module):
    """A linear layer to `outputs` numbers for each group, whose weights can also join a larger product.

    forward(x [*b, c]) -> [*b, groups * outputs]. forward(weight [g, k, c], bias [g, k]) -> the same with the
    layer's own rows of each group in front: [g, outputs + k, c], [g, outputs + k].
    """

    def __init__(self, width: int, groups: int, outputs: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * outputs, width))
        self.bias = nn.Parameter(torch.empty(groups * outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: Float[Tensor, "*b c"], bias: Float[Tensor, "g k"] | None = None
    ) -> Float[Tensor, "*b d"] | tuple[Float[Tensor, "g k2 c"], Float[Tensor, "g k2"]]:
        if bias is None:
            return map_linear(x, self.weight, self.bias)
        weight = torch.cat([self.weight.unflatten(0, (self.groups, -1)), x], dim=1)
        return weight, torch.cat([self.bias.unflatten(0, (self.groups, -1)), bias], dim=1)


class MapLinear(nn.Linear):
    """nn.Linear on the last axis of a map; see `map_linear`."""

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        return map_linear(x, self.weight, self.bias)


def map_linear(
    x: Float[Tensor, "*b c"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " d"]
) -> Float[Tensor, "*b d"]:
    """F.linear as one product of rows, whose bias is added within it: selective checkpointing keeps the product."""
    return rows_linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))


class DepthwiseNormGelu(nn.Conv2d):
    """gelu(norm(depth-wise convolution)) on a map; `norm` is weight and bias of the LayerNorm."""

    def __init__(self, width: int, size: int):
        super().__init__(width, width, size, padding=size // 2, groups=width)

    def forward(self, x: Float[Tensor, "b h w c"], norm: Float[Tensor, "2 c"]) -> Float[Tensor, "b h w c"]:
        return depthwise_norm_gelu(x, self.weight, self.bias, norm)


class GeluLinear(nn.Linear):
    """linear(gelu(x)) on the last axis of a map; keeps x alone for the backward pass."""

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        rows = rows_linear(x.flatten(0, -2), self.weight, self.bias, has_gelu=True)
        return rows.view(*x.shape[:-1], self.out_features)


class Mlp(nn.Module):
    """Linear, GELU, Linear on the last axis."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = MapLinear(width, hidden)
        self.fc2 = GeluLinear(hidden, width)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.fc2(self.fc1(x))


class Norm(nn.LayerNorm):
    """LayerNorm over channels. forward(None) hands a copy of weight and bias, [2, c], to a fused step that
    normalises in its place: under ZeRO-3 they are there in this module's forward only.
    """

    def __init__(self, width: int):
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Float[Tensor, "*b c"] | None) -> Float[Tensor, "*b c"] | Float[Tensor, "2 c"]:
        both = torch.stack([self.weight, self.bias])
        return both if x is None else layer_norm(x, both)


class ChannelsLast(nn.Module):
    """[b, c, h, w] -> [b, h, w, c]."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w c"]:
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """[b, h, w, c] -> [b, c, h, w]."""

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
        return x.permute(0, 3, 1, 2)


def _init_xavier(linear: nn.Module) -> None:
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
