"""How do mmsegmentation and mmdetection 3.x know InternImage? `custom_imports`, with this folder on PYTHONPATH.

Registered at mmengine's root, from where every toolkit of OpenMMLab finds it. Plain torch: no operator is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from internimage_network import InternImageNetwork, initialise
from torch import Tensor

try:
    from mmengine.registry import MODELS

    register = MODELS.register_module(name="InternImage")
except ImportError:  # the module alone serves too

    def register(module):
        return module


@register
class InternImage(InternImageNetwork):
    """Images [b, 3, h, w] -> tuple of maps [b, c_i, h_i, w_i] of the stages in `out_indices` (from 0).

    The other arguments are the published constructor's. With `init_cfg=dict(type="Pretrained", checkpoint=FILE)`
    weights load strictly: ValueError names what does not fit, where the toolkits themselves would go on.
    """

    def __init__(
        self,
        *arguments: Any,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        init_cfg: dict[str, Any] | None = None,
        core_op: str = "DCNv3",
        norm_layer: str = "LN",
        act_layer: str = "GELU",
        **options: Any,
    ):
        choices = {"core_op": core_op, "norm_layer": norm_layer, "act_layer": act_layer}
        if choices != {"core_op": "DCNv3", "norm_layer": "LN", "act_layer": "GELU"}:
            raise ValueError(f"{choices} is not served; choose core_op DCNv3, norm_layer LN, act_layer GELU")
        super().__init__(*arguments, **options)
        if init_cfg is not None and init_cfg.get("type") != "Pretrained":
            raise ValueError(f"init_cfg={init_cfg} is not served; choose type='Pretrained' or None")
        self.out_indices, self.init_cfg = tuple(out_indices), init_cfg
        self.apply(initialise)

    def init_weights(self) -> None:
        """What mmengine calls before training."""
        if self.init_cfg is not None:
            load_strictly(self, self.init_cfg["checkpoint"])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = super().forward(images)
        return tuple(maps[index] for index in self.out_indices)


def load_strictly(module: torch.nn.Module, path: str) -> None:
    """Weights of a file into the module, every key of both; ValueError names the first that do not fit.

    A module on the meta device takes the file's own pages in place of memory.
    """
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # once in memory, not twice
    content = content.get("state_dict", content.get("model", content))
    state = {key.removeprefix("backbone."): tensor for key, tensor in content.items()}
    try:
        module.load_state_dict(state, strict=True, assign=any(one.is_meta for one in module.parameters()))
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit this backbone: {error}; give the arguments that it was exported with"
        ) from error
