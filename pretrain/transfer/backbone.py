"""How do the heads of transformers and torchvision get at a pre-trained backbone? As an AutoBackbone of its own."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from pretrain.config import Backbone
from pretrain.evaluate.layers import layer_order
from pretrain.models.backbone import build_encoder
from pretrain.models.pyramid import Pyramid, strides_of
from pretrain.transfer.pretrained import Pretrained

MODEL_TYPE = "m3i_pyramid"


class PyramidConfig(BackboneConfigMixin, PreTrainedConfig):
    """A backbone of a recipe and the maps that a head wants of it, as transformers writes it down."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        image_size: int = 224,  # pixels, at which it was pre-trained
        pyramid_width: int = 256,
        num_maps: int = 4,  # as many as there are, from fine to coarse
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.backbone = asdict(Backbone()) if backbone is None else backbone
        self.image_size, self.pyramid_width, self.num_maps = image_size, pyramid_width, num_maps
        self.stage_names = [f"stage{i + 1}" for i in range(num_maps)]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)


class PyramidBackbone(BackboneMixin, PreTrainedModel):
    """`pyramid` behind transformers' interface: feature_maps of the wanted stages, channels first."""

    config_class = PyramidConfig
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config)
        encoder = build_encoder(Backbone(**config.backbone), config.image_size)
        self.pyramid = Pyramid(encoder, config.pyramid_width)
        self.num_features = list(self.pyramid.widths)
        self.post_init()

    def forward(
        self,
        pixel_values: Float[Tensor, "b 3 h w"],
        output_hidden_states: Any = None,
        return_dict: Any = None,
    ) -> BackboneOutput:
        maps = self.pyramid(pixel_values)
        return BackboneOutput(feature_maps=tuple(maps[index] for index in self.out_indices))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels along one side of a position, of the wanted stages."""
        return tuple(self.pyramid.strides[index] for index in self.out_indices)


AutoConfig.register(MODEL_TYPE, PyramidConfig)
AutoBackbone.register(PyramidConfig, PyramidBackbone)


def pyramid_config(pretrained: Pretrained, drop_path: float, width: int, most: int = 4) -> PyramidConfig:
    """That of a pre-trained backbone with the last `most` of its maps, fewer when it has fewer."""
    num_maps = len(strides_of(pretrained.encoder.stages))
    backbone = replace(
        pretrained.backbone, drop_path=drop_path, drop_path_schedule="linear", token_norm="none"
    )
    indices = list(range(num_maps))[-most:]
    return PyramidConfig(asdict(backbone), pretrained.views.size, width, num_maps, out_indices=indices)


def load_trunk(model: nn.Module, pretrained: nn.Module, *, is_frozen: bool) -> nn.Module:
    """Puts the trunk of a pre-trained encoder into the one inside of `model`, and returns that.

    Token heads after the trunk are no part of the maps: they stay as they are and get no gradient. Frozen, the trunk
    gets none either.
    """
    (pyramid,) = (module for module in model.modules() if isinstance(module, Pyramid))
    encoder = pyramid.encoder
    trunk = layer_order(pretrained)
    (part,) = {name.partition(".")[0] for name in trunk}
    encoder.get_submodule(part).load_state_dict(pretrained.get_submodule(part).state_dict())
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in trunk and not is_frozen)
    return encoder
