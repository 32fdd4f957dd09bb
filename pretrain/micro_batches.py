"""How does a large batch pass through a module that has memory for a small one? In parts, and twice.

The first pass keeps nothing. Losses, and all in which images meet, see the outputs of the whole batch; the backward
pass then computes each part again and hands its gradient on at once. So the gradient is that of the whole batch,
contrastive negatives included, for one more forward pass. Source: GradCache (arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Output = TypeVar("Output", Tensor, tuple[Tensor, ...])


def in_parts(num_parts: int, function: Callable[..., Output], *rows: Tensor) -> Output:
    """function(*rows), whose activations live for `num_parts` parts of the rows one after another.

    Every output row, of one tensor or of several, must depend on the same row of every input alone, and on nothing
    that is drawn or counted while it is computed: part i is computed twice. Parameters collect their gradient part
    by part, so that ranks reduce it after the backward pass (`coalesce_grad_reduction` of DeepSpeed).
    """
    if num_parts == 1:
        return function(*rows)
    anchor = torch.zeros((), device=rows[0].device, requires_grad=torch.is_grad_enabled())
    parts = zip(*(one.chunk(num_parts) for one in rows), strict=True)
    outputs = [_Twice.apply(function, anchor, *part) for part in parts]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return tuple(torch.cat(same) for same in zip(*outputs, strict=True))


class _Twice(torch.autograd.Function):
    """`anchor` gives the output a gradient though only parameters, which are no inputs, need it."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Output], anchor: Tensor, *inputs: Tensor) -> Output:
        ctx.function = function
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [
            one.detach().requires_grad_(needs) for one, needs in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
        return None, None, *(one.grad for one in inputs)
