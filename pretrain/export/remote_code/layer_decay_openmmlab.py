"""Which learning rate has a parameter of the backbone? That of the head times `decay_rate` for every layer above.

For mmsegmentation and mmdetection 3.x: `custom_imports`, with this folder on PYTHONPATH;
optim_wrapper=dict(constructor="BackboneLayerDecay", paramwise_cfg=dict(decay_rate=0.95, depths=[6, 6, 32, 6]), ...).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

try:
    from mmengine.optim import DefaultOptimWrapperConstructor
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS

    register = OPTIM_WRAPPER_CONSTRUCTORS.register_module(name="BackboneLayerDecay")
except ImportError:  # the rule alone serves too
    DefaultOptimWrapperConstructor = object

    def register(constructor):
        return constructor


PREFIX = "backbone."
EMBEDDINGS = ("pos_embed", "cls_token", "query_embed", "query_feat", "level_embed", "query_embedding")


@register
class BackboneLayerDecay(DefaultOptimWrapperConstructor):
    """One group a layer; vectors and embeddings have no weight decay."""

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        rate, depths = self.paramwise_cfg["decay_rate"], self.paramwise_cfg["depths"]
        groups: dict[tuple[int, bool], dict] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            above, decays = layers_above(name, depths), has_decay(name, parameter)
            if (above, decays) not in groups:
                groups[above, decays] = {
                    "params": [],
                    "lr": self.base_lr * rate**above,
                    "weight_decay": self.base_wd if decays else 0.0,
                }
            groups[above, decays]["params"].append(parameter)
        params.extend(groups.values())


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not any(part in EMBEDDINGS for part in name.split("."))


def layers_above(name: str, depths: Sequence[int]) -> int:
    """How many layers of the backbone stand between a parameter and the head; 0 outside of the backbone.

    InternImage (one depth a stage): 0 for the last block; what leads to a block counts with it, a norm at the end
    of a stage with the block before. ViT (one depth): 1 for the last block, as published for MAE and BEiT; the
    embeddings stand below the first.
    """
    if not name.startswith(PREFIX):
        return 0
    parts, total = name.removeprefix(PREFIX).split("."), sum(depths)
    if parts[0] == "layers":
        return total - int(parts[1])
    if parts[0] == "levels":
        before = sum(depths[: int(parts[1])])
        after = before + depths[int(parts[1])]
        block = {"blocks": before + int(parts[3]) if parts[2] == "blocks" else 0, "downsample": after}
        return total - 1 - block.get(parts[2], after - 1)
    if parts[0] in ("patch_embed", "pos_embed", "cls_token"):
        return total - 1 if len(depths) > 1 else total + 1
    return 0
