"""What describes an InternImage to transformers? The published constructor's arguments, and what its head is."""

from __future__ import annotations

from transformers import PretrainedConfig

try:  # transformers 5
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # transformers 4
    from transformers.utils.backbone_utils import BackboneConfigMixin

NETWORK = (  # what the network takes, under these names
    "channels",
    "depths",
    "groups",
    "mlp_ratio",
    "drop_path_rate",
    "drop_path_type",
    "layer_scale",
    "offset_scale",
    "post_norm",
    "dw_kernel_size",
    "res_post_norm",
    "level2_post_norm",
    "level2_post_norm_block_ids",
    "center_feature_scale",
    "remove_center",
    "with_cp",
)


class InternImageConfig(BackboneConfigMixin, PretrainedConfig):
    """`head` says what stands on the stages: `clip_projector` (stride-16 tokens, attention pooling), `tokens` (the
    tokens alone, pooled by their mean) or `conv_head` (published T to XL: average pooling). None follows the
    published `use_clip_projector`. Stages are named stage1 to stage4 for `out_features` and `out_indices`.
    """

    model_type = "internimage"

    def __init__(
        self,
        channels=64,
        depths=(4, 4, 18, 4),
        groups=(4, 8, 16, 32),
        mlp_ratio=4.0,
        drop_path_rate=0.0,
        drop_path_type="linear",
        layer_scale=None,
        offset_scale=1.0,
        post_norm=False,
        dw_kernel_size=3,
        res_post_norm=False,
        level2_post_norm=False,
        level2_post_norm_block_ids=None,
        center_feature_scale=False,
        remove_center=False,
        with_cp=False,
        use_clip_projector=False,
        head=None,
        cls_scale=1.5,
        token_width=1024,
        pooled_width=768,
        pool_heads=16,
        out_features=None,
        out_indices=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.channels = channels
        self.depths = list(depths)
        self.groups = list(groups)
        self.mlp_ratio = mlp_ratio
        self.drop_path_rate = drop_path_rate
        self.drop_path_type = drop_path_type
        self.layer_scale = layer_scale
        self.offset_scale = offset_scale
        self.post_norm = post_norm
        self.dw_kernel_size = dw_kernel_size
        self.res_post_norm = res_post_norm
        self.level2_post_norm = level2_post_norm
        self.level2_post_norm_block_ids = level2_post_norm_block_ids
        self.center_feature_scale = center_feature_scale
        self.remove_center = remove_center
        self.with_cp = with_cp
        self.use_clip_projector = use_clip_projector
        self.head = head or ("clip_projector" if use_clip_projector else "conv_head")
        self.cls_scale = cls_scale
        self.token_width = token_width
        self.pooled_width = pooled_width
        self.pool_heads = pool_heads
        self.stage_names = [f"stage{index + 1}" for index in range(len(self.depths))]
        self.hidden_size = channels * 2 ** (len(self.depths) - 1)
        features = None if out_features is None else list(out_features)
        indices = None if out_indices is None else list(out_indices)
        if hasattr(self, "set_output_features_output_indices"):  # transformers 5
            self.set_output_features_output_indices(out_features=features, out_indices=indices)
        else:
            from transformers.utils.backbone_utils import get_aligned_output_features_output_indices

            self._out_features, self._out_indices = get_aligned_output_features_output_indices(
                out_features=features, out_indices=indices, stage_names=self.stage_names
            )

    @property
    def network(self):
        """Keyword arguments of the network."""
        return {name: getattr(self, name) for name in NETWORK}
