"""Which InternImage sizes exist, and what describes one? (no torch)"""

from __future__ import annotations

from dataclasses import dataclass

# Published: the additional norms of InternImage-H and G stand in the third stage only ("level 2").
LEVEL2 = 2
STEM_STRIDE = 4  # pixels a side of one position of the first stage


@dataclass(frozen=True)
class InternImageConfig:
    """One InternImage; the field names are those of the published constructor where it has them.

    Raises ValueError for a combination that no network can be built from.
    """

    channels: int  # width of the first stage; doubles from stage to stage
    depths: tuple[int, ...]  # blocks of each stage; two stages or more
    groups: tuple[int, ...]  # deformable groups of each stage; each divides its stage's width
    mlp_ratio: float = 4.0  # hidden width of the MLP / width
    offset_scale: float = 1.0  # sampling grid and offsets are multiplied by it
    layer_scale: float | None = None  # initial value of gamma; None: no gamma
    post_norm: bool = False  # x + norm(f(x)) in place of x + f(norm(x))
    res_post_norm: bool = False  # x + norm'(f(norm(x))), needs post_norm=False
    dw_kernel_size: int = 3  # odd; side of the depth-wise convolution that predicts offsets and masks
    level2_post_norm_block_ids: tuple[
        int, ...
    ] = ()  # blocks of the third stage followed by a norm of their own
    center_feature_scale: bool = False  # blends the sampled value with the unsampled one, by group
    remove_center: bool = False  # 8 sampling points in place of 9
    use_clip_projector: bool = False  # classifier: stride tokens and attention pooling, else average pooling
    drop_path_rate: float = 0.0  # probability of dropping a residual branch for one image, in [0, 1)
    drop_path_type: str = "linear"  # linear: from 0 at the first block up to the rate; or uniform

    def __post_init__(self):
        if len(self.depths) < 2 or len(self.depths) != len(self.groups):
            raise ValueError(
                f"internimage.depths={self.depths} and groups={self.groups} must name two stages or more, "
                "and the same number of them"
            )
        if min(self.depths) < 1 or self.channels < 2 or self.channels % 2:
            raise ValueError(
                f"internimage.channels={self.channels} must be even and depths={self.depths} at least 1: "
                "the stem's first convolution is half as wide as the first stage"
            )
        for width, groups in zip(self.widths, self.groups, strict=True):
            if groups < 1 or width % groups:
                raise ValueError(
                    f"internimage.groups={self.groups}: {groups} does not divide the stage width {width}; "
                    f"a published group is 16 or 32 channels wide"
                )
        if self.post_norm and self.res_post_norm:
            raise ValueError("internimage.post_norm=True excludes res_post_norm=True: choose one of them")
        if self.res_post_norm and self.layer_scale is not None:
            raise ValueError(
                f"internimage.layer_scale={self.layer_scale} is unused with res_post_norm=True: use None"
            )
        if self.dw_kernel_size < 1 or self.dw_kernel_size % 2 == 0:
            raise ValueError(f"internimage.dw_kernel_size={self.dw_kernel_size} must be odd and positive")
        ids = self.level2_post_norm_block_ids
        blocks = self.depths[LEVEL2] if self.num_stages > LEVEL2 else 0
        if list(ids) != sorted(set(ids)) or any(not 0 <= i < blocks for i in ids):
            raise ValueError(
                f"internimage.level2_post_norm_block_ids={ids} must rise and name blocks of the third stage, "
                f"which has {blocks}"
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"internimage.drop_path_rate={self.drop_path_rate} must lie in [0, 1)")
        if self.drop_path_type not in DROP_PATHS:
            raise ValueError(
                f"internimage.drop_path_type={self.drop_path_type!r} is unknown; "
                f"choose from {sorted(DROP_PATHS)}"
            )

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.channels * 2**stage for stage in range(len(self.depths)))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels a side of one position of each stage."""
        return tuple(STEM_STRIDE * 2**stage for stage in range(len(self.depths)))

    @property
    def has_stage_norm(self) -> bool:
        """Whether a stage ends in a norm: its blocks leave the residual stream unnormalised."""
        return not self.post_norm or self.center_feature_scale

    @property
    def drop_paths(self) -> tuple[float, ...]:
        """Drop probability of every block, in the order of the forward pass."""
        return DROP_PATHS[self.drop_path_type](self.drop_path_rate, sum(self.depths))


def _linear(rate: float, blocks: int) -> tuple[float, ...]:
    return tuple(rate * block / max(blocks - 1, 1) for block in range(blocks))


def _uniform(rate: float, blocks: int) -> tuple[float, ...]:
    return (rate,) * blocks


DROP_PATHS = {"linear": _linear, "uniform": _uniform}

# Widths, depths, groups, norms: "InternImage" (arXiv 2211.05778), Table 1, and the published configurations.
INTERNIMAGE: dict[str, InternImageConfig] = {
    # configs/internimage_t_1k_224.yaml
    "internimage_t": InternImageConfig(channels=64, depths=(4, 4, 18, 4), groups=(4, 8, 16, 32)),
    # configs/internimage_s_1k_224.yaml
    "internimage_s": InternImageConfig(
        channels=80, depths=(4, 4, 21, 4), groups=(5, 10, 20, 40), layer_scale=1e-5, post_norm=True
    ),
    # configs/internimage_b_1k_224.yaml
    "internimage_b": InternImageConfig(
        channels=112, depths=(4, 4, 21, 4), groups=(7, 14, 28, 56), layer_scale=1e-5, post_norm=True
    ),
    # configs/internimage_l_22k_192to384.yaml
    "internimage_l": InternImageConfig(
        channels=160,
        depths=(5, 5, 22, 5),
        groups=(10, 20, 40, 80),
        layer_scale=1e-5,
        offset_scale=2.0,
        post_norm=True,
    ),
    # configs/internimage_xl_22k_192to384.yaml
    "internimage_xl": InternImageConfig(
        channels=192,
        depths=(5, 5, 24, 5),
        groups=(12, 24, 48, 96),
        layer_scale=1e-5,
        offset_scale=2.0,
        post_norm=True,
    ),
    # configs/internimage_h_22kto1k_384.yaml; pre-training at 192 px: M3I (arXiv 2211.09807), Table 7
    "internimage_h": InternImageConfig(
        channels=320,
        depths=(6, 6, 32, 6),
        groups=(10, 20, 40, 80),
        res_post_norm=True,
        dw_kernel_size=5,
        level2_post_norm_block_ids=(5, 11, 17, 23, 29),
        center_feature_scale=True,
        use_clip_projector=True,
    ),
    # configs/internimage_g_22kto1k_512.yaml
    "internimage_g": InternImageConfig(
        channels=512,
        depths=(2, 2, 48, 4),
        groups=(16, 32, 64, 128),
        post_norm=True,
        dw_kernel_size=5,
        level2_post_norm_block_ids=(5, 11, 17, 23, 29, 35, 41, 47),
        center_feature_scale=True,
        use_clip_projector=True,
    ),
    # ours: H in small, three stages, tokens at stride 8; what `m3i.demo` trains
    "internimage_demo": InternImageConfig(
        channels=32,
        depths=(1, 1, 2),
        groups=(2, 4, 8),
        res_post_norm=True,
        dw_kernel_size=5,
        center_feature_scale=True,
        use_clip_projector=True,
    ),
    # ours: the smallest with four stages, for tests
    "internimage_tiny": InternImageConfig(
        channels=16,
        depths=(1, 1, 1, 1),
        groups=(1, 2, 4, 8),
        res_post_norm=True,
        dw_kernel_size=5,
        center_feature_scale=True,
        use_clip_projector=True,
    ),
}
