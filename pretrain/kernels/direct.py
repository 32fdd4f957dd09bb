"""How does eager code call a kernel without the detour of a custom operator?

A custom operator is what torch.compile, fake tensors and selective checkpointing see, and costs the host
a way through torch's Python dispatcher: with 64 images InternImage-H's step kept the host busy for 217 ms and an H200
for 164. Where nobody watches, the same function is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_watched() -> bool:
    """Does something need to see operators: a compiler, or a mode such as fake tensors or a counter?"""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def direct(operator: Any) -> Callable[..., Any]:
    """The custom operator without gradient, or its own function where nobody watches."""
    function = operator._init_fn

    def call(*arguments: Any) -> Any:
        return operator(*arguments) if is_watched() else function(*arguments)

    return call


def differentiable(
    operator: Any,
    setup_context: Callable[[Any, tuple, Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """Registers a custom operator's gradient; gives what calls it, or its own function where nobody watches."""
    operator.register_autograd(backward, setup_context=setup_context)
    function = operator._init_fn

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = function(*arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            return backward(ctx, *gradients)

    def call(*arguments: Any) -> Any:
        return operator(*arguments) if is_watched() else Direct.apply(*arguments)

    return call
