"""How do the weights move? AdamW groups, and the schedules of learning rate and teacher momentum."""

from __future__ import annotations

import math

import torch
from torch import nn

from pretrain.config import Optim, Run


def make_optimizer(module: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors and scalars (biases, norms, tokens) and Swin's tables of biases
    by relative position do not decay.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    # Under ZeRO-3 a partitioned parameter is flat; `ds_shape` keeps its real one.
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in named}
    # A class token [1, 1, d] is a vector.
    decays = {
        name: sum(length > 1 for length in shape) > 1 and not name.endswith("relative_position_bias_table")
        for name, shape in shapes.items()
    }
    groups = [
        {"params": [p for name, p in named if decays[name]], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in named if not decays[name]], "weight_decay": 0.0},
    ]
    # One kernel for many weights on a GPU; on the CPU the plain one, whose bits tests compare.
    is_fused = all(p.device.type == "cuda" for _, p in named)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=0.0,
        fused=is_fused,
    )


def learning_rate(step: int, run: Run) -> float:
    """Rate of optimizer step `step`, counted from 0: linear warm-up, then cosine to `final_lr`."""
    return warm_cosine(step, run.steps, run.optim.warmup, run.optim.lr, run.optim.final_lr)


def warm_cosine(step: int, steps: int, warmup: int, peak: float, end: float) -> float:
    """Rate of step `step` of `steps`: rises to `peak` in `warmup` equal parts, then falls to `end` as a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return _cosine(step - warmup, max(steps - warmup, 1), peak, end)


def teacher_momentum(step: int, run: Run) -> float:
    """Share of the old teacher kept after optimizer step `step`: cosine from momentum to final_momentum."""
    return _cosine(step, run.steps, run.teacher.momentum, run.teacher.final_momentum)


def _cosine(step: int, steps: int, start: float, end: float) -> float:
    progress = min(max(step / steps, 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
