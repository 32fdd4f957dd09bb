"""How does transformers run an InternImage? Model, backbone and image classifier in plain torch, no build needed.

Tensor names are those of the published transformers checkpoints: `model.` and the network's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutputWithNoAttention, ModelOutput

from .configuration_internimage import InternImageConfig
from .internimage_network import InternImageNetwork, initialise, norm

try:  # transformers 5
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # transformers 4
    from transformers.utils.backbone_utils import BackboneMixin


@dataclass
class InternImageOutput(ModelOutput):
    """last_hidden_state [b, c, h, w]: map of the last stage; pooler_output [b, d]: the embedding of the image;
    tokens [b, l, d] at stride 16, row by row (None with a `conv_head`); hidden_states: maps of all stages.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    tokens: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class InternImagePreTrainedModel(PreTrainedModel):
    config_class = InternImageConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = False  # config.with_cp=True computes blocks again
    _no_split_modules = ["Block"]  # noqa: RUF012  transformers reads a list

    def _init_weights(self, module):
        initialise(module)
        if isinstance(module, CrossAttention):
            for bias in (module.q_bias, module.k_bias, module.v_bias):
                nn.init.zeros_(bias)


class InternImageModel(InternImagePreTrainedModel):
    """AutoModel: the maps of the stages, the tokens and the image's embedding."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.head\."]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = InternImageNetwork(**config.network, scale_name="layer_scale")
        add_head(self.model, config)
        self.post_init()

    def forward(self, pixel_values, output_hidden_states=None, return_dict=None, **kwargs):
        maps = self.model(pixel_values)
        pooled, tokens = pool(self.model, maps)
        wants_maps = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        output = InternImageOutput(
            last_hidden_state=maps[-1],
            pooler_output=pooled,
            tokens=tokens,
            hidden_states=tuple(maps) if wants_maps else None,
        )
        return output.to_tuple() if return_dict is False else output


class InternImageForImageClassification(InternImagePreTrainedModel):
    """AutoModelForImageClassification: logits of `config.num_labels` classes from the image's embedding."""

    def __init__(self, config):
        super().__init__(config)
        self.model = InternImageNetwork(**config.network, scale_name="layer_scale")
        width = add_head(self.model, config)
        self.model.head = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None, output_hidden_states=None, return_dict=None, **kwargs):
        maps = self.model(pixel_values)
        logits = self.model.head(pool(self.model, maps)[0])
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        hidden_states = tuple(maps) if output_hidden_states else None
        output = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=hidden_states)
        return output.to_tuple() if return_dict is False else output


class InternImageBackbone(BackboneMixin, InternImagePreTrainedModel):
    """AutoBackbone: feature maps [b, c, h, w] of the stages in `config.out_features`."""

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^model\.(head|fc_norm|clip_projector|conv_head|dcnv3_head_x3|dcnv3_head_x4)\."
    ]

    def __init__(self, config):
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers 4
            self._init_backbone(config)
        self.model = InternImageNetwork(**config.network, scale_name="layer_scale")
        self.num_features = list(self.model.widths)
        self.post_init()

    def forward(
        self, pixel_values, output_hidden_states=None, output_attentions=None, return_dict=None, **kwargs
    ):
        maps = dict(zip(self.stage_names, self.model(pixel_values), strict=True))
        output = BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),
            hidden_states=tuple(maps.values()) if output_hidden_states else None,
            attentions=None,
        )
        return output.to_tuple() if return_dict is False else output


def add_head(model, config):
    """Gives the network the modules of `config.head`, under their published names; width of the pooled vector."""
    last, before = model.widths[-1], model.widths[-2]
    if config.head == "conv_head":
        width = int(last * config.cls_scale)
        convolution = nn.Conv2d(last, width, 1, bias=False)
        model.conv_head = nn.Sequential(convolution, nn.Sequential(nn.BatchNorm2d(width)), nn.GELU())
        return width
    if config.head not in ("clip_projector", "tokens"):
        raise ValueError(
            f"head={config.head!r} is unknown; choose from clip_projector, conv_head and tokens in config.json"
        )
    shuffled = nn.Conv2d(last, config.token_width * 4, 1)
    model.dcnv3_head_x4 = nn.Sequential(shuffled, nn.PixelShuffle(2))
    model.dcnv3_head_x3 = nn.Conv2d(before, config.token_width, 1)
    if config.head == "tokens":
        return config.token_width
    model.clip_projector = AttentionPool(config.token_width, config.pooled_width, config.pool_heads)
    model.fc_norm = nn.Sequential(norm(config.pooled_width))
    return config.pooled_width


def pool(model, maps):
    """Stage maps -> the embedding [b, d], and the tokens [b, l, d] that it was pooled from (None: there are none)."""
    if hasattr(model, "conv_head"):
        return model.conv_head(maps[-1]).mean((2, 3)), None
    fine, coarse = maps[-2], maps[-1]
    if (fine.shape[2], fine.shape[3]) != (2 * coarse.shape[2], 2 * coarse.shape[3]):
        raise ValueError(
            f"the last two maps are {tuple(fine.shape[2:])} and {tuple(coarse.shape[2:])}, but tokens need the first "
            "to be twice the second: use image sides that are multiples of the last stage's stride"
        )
    tokens = (model.dcnv3_head_x3(fine) + model.dcnv3_head_x4(coarse)).flatten(2).mT
    if not hasattr(model, "clip_projector"):
        return tokens.mean(1), tokens
    return model.fc_norm(model.clip_projector(tokens)), tokens


class AttentionPool(nn.Module):
    """The mean token attends to the tokens [b, l, width] -> [b, out_width]."""

    def __init__(self, width, out_width, num_heads):
        super().__init__()
        self.norm1_q = nn.Sequential(norm(width))
        self.norm1_k = nn.Sequential(norm(width))
        self.norm1_v = nn.Sequential(norm(width))
        self.cross_dcn = CrossAttention(width, out_width, num_heads)

    def forward(self, tokens):
        query = self.norm1_q(tokens.mean(1, keepdim=True))
        return self.cross_dcn(query, self.norm1_k(tokens), self.norm1_v(tokens))[:, 0]


class CrossAttention(nn.Module):
    """Multi-head attention whose biases are parameters of its own, as published."""

    def __init__(self, width, out_width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, out_width)

    def forward(self, query, key, value):
        rows = (
            linear + bias
            for linear, bias in (
                (self.q(query), self.q_bias),
                (self.k(key), self.k_bias),
                (self.v(value), self.v_bias),
            )
        )
        q, k, v = (row.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for row in rows)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
