"""Which engine do ranks compare? The real one around the real model, in float32 on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pretrain.config import Run
from pretrain.ds_config import resolve_config
from pretrain.engine import Engine
from pretrain.facts import DataFacts
from pretrain.pretrainer import Pretrainer
from pretrain.towers import Towers
from tests.paths import ROOT
from tests.stand_ins import StandInGuide

PERTURBATION = 0.05  # of weights that start at zero and would hide what multiplies them
NONE: Mapping[str, Any] = {}


def float32_engine(
    run: Run,
    facts: DataFacts,
    name: str,
    changes: Mapping[str, Any] = NONE,
    smooth: bool = False,
    micro_batches: int = 1,
) -> Engine:
    """With ds_configs/NAME.json, whose ZeRO section takes `changes`; equal weights on any number of ranks.

    `smooth` puts GELU in place of ReLU, whose gradient jumps where sums are rounded to the other side of 0.
    """
    ds_config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    ds_config["bf16"]["enabled"] = False
    ds_config["zero_optimization"] |= changes
    config, _ = resolve_config(ds_config, run, torch.device("cpu"))
    torch.manual_seed(run.seed)
    model, teacher = Pretrainer(run, facts, micro_batches), Towers(run, facts)
    if smooth:
        for module in (*model.modules(), *teacher.modules()):
            for child in [key for key, value in module.named_children() if isinstance(value, nn.ReLU)]:
                setattr(module, child, nn.GELU())
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=PERTURBATION)
    guide = StandInGuide() if run.objective.needs_guide else None
    return Engine(model, teacher, run, config, guide)
