"""How fast does each layer of a backbone and its head learn at each step?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from pretrain.evaluate.layers import decay_of_depth, layer_order, names_without_decay
from pretrain.optim import warm_cosine
from pretrain.transfer.recipes import Optimisation


def _linear(step: int, optimisation: Optimisation) -> float:
    return 1 - step / optimisation.steps


def _step(step: int, optimisation: Optimisation) -> float:
    return 0.1 ** sum(step >= share * optimisation.steps for share in optimisation.milestones)


def _cosine(step: int, optimisation: Optimisation) -> float:
    return warm_cosine(step, optimisation.steps, 0, 1.0, 0.0)


SCHEDULES: dict[str, Callable[[int, Optimisation], float]] = {
    "linear": _linear,
    "step": _step,
    "cosine": _cosine,
}


def rate(step: int, optimisation: Optimisation) -> float:
    """Rate of step `step`, from 0, of the head; linear warm-up times the schedule."""
    rise = min(1.0, (step + 1) / optimisation.warmup) if optimisation.warmup else 1.0
    return optimisation.lr * rise * SCHEDULES[optimisation.schedule](step, optimisation)


class Layered(nn.Module):
    """A model that tells timm which layer of its backbone a parameter belongs to; heads come last."""

    def __init__(self, model: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.model = model
        (path,) = (name for name, module in self.named_modules() if module is encoder)
        self._order = {f"{path}.{name}": float(layer) for name, layer in layer_order(encoder).items()}
        self._exempt = {f"{path}.{name}" for name in names_without_decay(encoder)}

    def group_matcher(self, coarse: bool) -> Callable[[str], float]:
        """Name of a parameter -> place of its layer."""
        return lambda name: self._order.get(name, math.inf)

    def groups(self, optimisation: Optimisation) -> list[dict[str, Any]]:
        """Parameter groups with `lr_scale`, the rate of a layer / that of the head."""
        depth = int(max(self._order.values()))
        decay = decay_of_depth(optimisation.layer_decay, optimisation.decay_depth, depth)
        groups = param_groups_layer_decay(self, optimisation.weight_decay, self._exempt, layer_decay=decay)
        backbone = {id(weight) for name, weight in self.named_parameters() if name in self._order}
        for group in groups:
            if id(group["params"][0]) in backbone:  # a group holds one layer
                group["lr_scale"] *= optimisation.backbone_rate
        return groups
