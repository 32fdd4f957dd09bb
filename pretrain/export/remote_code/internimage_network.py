"""What does an InternImage compute, in plain torch? Copied into every export that another toolkit runs.

No other file of this project and no compiled operator is needed. Parameter names are those of the published
checkpoints. Source: "InternImage" (arXiv 2211.05778).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

NORM_EPS = 1e-6
KERNEL = 3  # side of the sampling grid
LEVEL2 = 2  # the stage that has norms between its blocks


class InternImageNetwork(nn.Module):
    """Images [b, 3, h, w] -> maps [b, c_i, h_i, w_i], one a stage, each behind the norm of its stage.

    The arguments are those of the published constructor. `scale_name` is what the layer scale is called in the
    state dict: `gamma` (published) or `layer_scale` (the published transformers layout).
    """

    def __init__(
        self,
        channels: int,
        depths: Sequence[int],
        groups: Sequence[int],
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_path_type: str = "linear",
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        dw_kernel_size: int = 3,
        res_post_norm: bool = False,
        level2_post_norm: bool = False,
        level2_post_norm_block_ids: Sequence[int] | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        with_cp: bool = False,
        scale_name: str = "gamma",
    ):
        super().__init__()
        if drop_path_type not in ("linear", "uniform"):
            raise ValueError(f"drop_path_type={drop_path_type!r} is unknown; choose from linear, uniform")
        if len(depths) != len(groups):
            raise ValueError(f"depths={depths} and groups={groups} must name the same number of stages")
        self.widths = [channels * 2**stage for stage in range(len(depths))]
        self.with_cp = with_cp  # computes blocks again in the backward pass, for memory
        last = max(sum(depths) - 1, 1)
        rates = [
            drop_path_rate * (index / last if drop_path_type == "linear" else 1)
            for index in range(sum(depths))
        ]
        self.patch_embed = Stem(channels)
        self.levels = nn.ModuleList()
        for stage, depth in enumerate(depths):
            options = {
                "width": self.widths[stage],
                "groups": groups[stage],
                "hidden": int(self.widths[stage] * mlp_ratio),
                "layer_scale": layer_scale,
                "offset_scale": offset_scale,
                "post_norm": post_norm,
                "dw_kernel_size": dw_kernel_size,
                "res_post_norm": res_post_norm,
                "center_feature_scale": center_feature_scale,
                "remove_center": remove_center,
                "scale_name": scale_name,
            }
            blocks, rates = [Block(drop_path=rate, **options) for rate in rates[:depth]], rates[depth:]
            ids = (level2_post_norm_block_ids or ()) if level2_post_norm and stage == LEVEL2 else ()
            self.levels.append(
                Stage(
                    blocks,
                    width=self.widths[stage],
                    has_norm=not post_norm or center_feature_scale,
                    post_norm_ids=tuple(ids),
                    is_last=stage == len(depths) - 1,
                )
            )

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = self.patch_embed(images), []
        for stage in self.levels:
            stage_map, x = stage(x, self.with_cp)
            maps.append(stage_map.permute(0, 3, 1, 2).contiguous())
        return maps


class Stem(nn.Module):
    """Images [b, 3, h, w] -> [b, h / 4, w / 4, channels]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(Permute(0, 2, 3, 1), norm(channels // 2), Permute(0, 3, 1, 2))
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(Permute(0, 2, 3, 1), norm(channels))

    def forward(self, images: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(images)))))


class Stage(nn.Module):
    """[b, h, w, c] -> the stage's map, and the next stage's input (None after the last)."""

    def __init__(
        self,
        blocks: list[nn.Module],
        width: int,
        has_norm: bool,
        post_norm_ids: tuple[int, ...],
        is_last: bool,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Sequential(norm(width)) if has_norm else None
        self.post_norm_ids = post_norm_ids
        if post_norm_ids:
            self.post_norms = nn.ModuleList(nn.Sequential(norm(width)) for _ in post_norm_ids)
        self.downsample = None if is_last else Downsample(width)

    def forward(self, x: Tensor, with_cp: bool = False) -> tuple[Tensor, Tensor | None]:
        for index, block in enumerate(self.blocks):
            if with_cp and x.requires_grad:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if index in self.post_norm_ids:
                x = self.post_norms[self.post_norm_ids.index(index)](x)
        if self.norm is not None:
            x = self.norm(x)
        return x, None if self.downsample is None else self.downsample(x)


class Downsample(nn.Module):
    """[b, h, w, c] -> [b, ceil(h / 2), ceil(w / 2), 2 c]."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(Permute(0, 2, 3, 1), norm(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Block(nn.Module):
    """Two residual branches, DCNv3 and MLP: pre-norm, post-norm or res-post-norm."""

    def __init__(
        self,
        width: int,
        groups: int,
        hidden: int,
        drop_path: float,
        layer_scale: float | None,
        offset_scale: float,
        post_norm: bool,
        dw_kernel_size: int,
        res_post_norm: bool,
        center_feature_scale: bool,
        remove_center: bool,
        scale_name: str,
    ):
        super().__init__()
        self.post_norm, self.res_post_norm, self.drop_path = post_norm, res_post_norm, drop_path
        self.scale_name, self.layer_scale = scale_name, layer_scale
        self.norm1 = nn.Sequential(norm(width))
        self.dcn = DCNv3(width, groups, offset_scale, dw_kernel_size, center_feature_scale, remove_center)
        self.norm2 = nn.Sequential(norm(width))
        self.mlp = Mlp(width, hidden)
        if res_post_norm:
            self.res_post_norm1 = nn.Sequential(norm(width))
            self.res_post_norm2 = nn.Sequential(norm(width))
        if layer_scale is not None:
            for branch in (1, 2):
                scale = nn.Parameter(torch.full((width,), float(layer_scale)))
                self.register_parameter(f"{scale_name}{branch}", scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._branch(x, self.dcn, 1)
        return x + self._branch(x, self.mlp, 2)

    def _branch(self, x: Tensor, module: nn.Module, branch: int) -> Tensor:
        inner = getattr(self, f"norm{branch}")
        y = inner(module(x)) if self.post_norm else module(inner(x))
        if self.res_post_norm:
            y = getattr(self, f"res_post_norm{branch}")(y)
        if self.layer_scale is not None:
            y = getattr(self, f"{self.scale_name}{branch}") * y
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            y = y * torch.empty(len(y), 1, 1, 1, dtype=y.dtype, device=y.device).bernoulli_(keep).div_(keep)
        return y


class DCNv3(nn.Module):
    """Deformable convolution whose offsets and masks come from a depth-wise convolution, on [b, h, w, c]."""

    def __init__(
        self,
        width: int,
        groups: int,
        offset_scale: float,
        dw_kernel_size: int,
        center_feature_scale: bool,
        remove_center: bool,
    ):
        super().__init__()
        points = KERNEL**2 - remove_center
        self.groups, self.offset_scale, self.remove_center = groups, offset_scale, remove_center
        self.center_feature_scale = center_feature_scale
        self.dw_conv = nn.Sequential(
            nn.Conv2d(width, width, dw_kernel_size, padding=dw_kernel_size // 2, groups=width),
            nn.Sequential(Permute(0, 2, 3, 1), norm(width)),
            nn.GELU(),
        )
        self.offset = nn.Linear(width, groups * points * 2)
        self.mask = nn.Linear(width, groups * points)
        self.input_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, width))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))

    def forward(self, x: Tensor) -> Tensor:
        value, guide = self.input_proj(x), self.dw_conv(x.permute(0, 3, 1, 2))
        logits = self.mask(guide).unflatten(-1, (self.groups, -1))
        offsets = self.offset(guide).unflatten(-1, (self.groups, -1, 2))
        sampled = sample(value, offsets, logits.float().softmax(-1), self.offset_scale, self.remove_center)
        if self.center_feature_scale:
            weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            scale = F.linear(guide, weight, bias).sigmoid()[..., None]
            grouped = (tensor.unflatten(-1, (self.groups, -1)) for tensor in (sampled, value))
            sampled = torch.lerp(*grouped, scale.to(value.dtype)).flatten(-2)
        return self.output_proj(sampled)


def sample(value: Tensor, offsets: Tensor, mask: Tensor, offset_scale: float, remove_center: bool) -> Tensor:
    """Mask-weighted bilinear samples of `value` [b, h, w, c] -> [b, h, w, c]; zero outside the map.

    offsets [b, h, w, groups, points, 2] are (x, y) in pixels, mask [b, h, w, groups, points]. Locations and sums
    are float32 at least: bfloat16 cannot tell neighbouring pixels of a large map apart.
    """
    b, h, w, _ = value.shape
    groups, dtype, device = mask.shape[3], torch.promote_types(value.dtype, torch.float32), value.device
    reach = KERNEL // 2
    steps = range(-reach, reach + 1)
    points = [(x, y) for x in steps for y in steps if not (remove_center and x == y == 0)]  # x outside
    where = (torch.tensor(points, dtype=dtype, device=device) + offsets.to(dtype)) * offset_scale
    columns = torch.arange(w, dtype=dtype, device=device).view(w, 1, 1)
    rows = torch.arange(h, dtype=dtype, device=device).view(h, 1, 1, 1)
    # grid_sample counts from -1 at the left edge of the first pixel to 1 at the right edge of the last.
    x, y = (2 * (where[..., 0] + columns) + 1) / w - 1, (2 * (where[..., 1] + rows) + 1) / h - 1
    locations = torch.stack([x, y], dim=-1).permute(0, 3, 1, 2, 4, 5).reshape(b * groups, h * w, -1, 2)
    values = value.to(dtype).unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    samples = F.grid_sample(values, locations, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = mask.to(dtype).permute(0, 3, 1, 2, 4).reshape(b * groups, 1, h * w, -1)
    out = (samples * weights).sum(-1).view(b, groups, -1, h, w)
    return out.permute(0, 3, 4, 1, 2).flatten(-2).to(value.dtype)


class Mlp(nn.Module):
    """Linear, GELU, Linear on the last axis."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Permute(nn.Module):
    """The axes of a tensor in another order."""

    def __init__(self, *axes: int):
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=NORM_EPS)


def initialise(module: nn.Module) -> None:
    """Published initialisation of one module's own parameters; for `nn.Module.apply`, children come first."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, DCNv3):  # every point starts on the regular grid with equal weight
        for linear in (module.offset, module.mask):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (module.input_proj, module.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if module.center_feature_scale:
            nn.init.zeros_(module.center_feature_scale_proj_weight)
            nn.init.zeros_(module.center_feature_scale_proj_bias)
    elif isinstance(module, Block) and module.layer_scale is not None:
        for branch in (1, 2):
            nn.init.constant_(getattr(module, f"{module.scale_name}{branch}"), module.layer_scale)
