"""What of a block is kept for the backward pass, and what is computed again? One function a choice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

RunBlock = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]

# Kept by `selective`: linear layers, convolutions, attention, and operators of our own. Not mm: under ZeRO-3
# DeepSpeed's F.linear adds the bias into the product of what is not rows, and done again on a kept product it
# would be added twice. InternImage multiplies rows; the linear layers of a ViT are computed again under ZeRO-3.
EXPENSIVE = (
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
OWN = ("pretrain::dcnv3",)  # of our own operators; the others move memory and do little


def _policy(context: Any, operator: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    is_kept = operator in EXPENSIVE or operator.name() in OWN
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def keep_all(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Nothing is computed twice: fastest, and most memory."""
    return block(x)


def keep_expensive(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Norms, activations, softmax, sums and blends are computed again from what EXPENSIVE operators gave."""
    context = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, x, use_reentrant=False, context_fn=context)


def keep_input(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Only the block's input is kept: least memory, a third more time. Chen et al. (arXiv 1604.06174)."""
    return checkpoint(block, x, use_reentrant=False)


CHECKPOINTS: dict[str, RunBlock] = {"none": keep_all, "selective": keep_expensive, "full": keep_input}
