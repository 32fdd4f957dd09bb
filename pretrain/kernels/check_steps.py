"""Do the steps around DCNv3 equal their plain formulation here, do they repeat, and how long do they take?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.kernels.check import LIMITS, Check, seconds
from pretrain.kernels.pointwise import choose, depthwise_norm_gelu, gelu_again, residual_norm

SHAPE = (2, 24, 24, 640)  # the second stage of InternImage-H at 192 px
WIDTH = SHAPE[-1]
# Gradients of vectors add up thousands of rounded numbers.
SLACK = 2.0


def _residual(path: str | None, x: Tensor, branch: Tensor, outer: Tensor, following: Tensor) -> list[Tensor]:
    share = torch.tensor([0.0, 2.0], device=x.device)
    return list(residual_norm(x, branch, share=share, outer=outer, following=following, path=path))


def _depthwise(path: str | None, x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor) -> list[Tensor]:
    return [depthwise_norm_gelu(x, weight, bias, norm, path=path)]


def _gelu(path: str | None, x: Tensor, grad: Tensor) -> list[Tensor]:
    return list(gelu_again(x, grad, path=path))


# name -> (function of path and leaves, shapes of the leaves, has it a gradient)
STEPS: dict[str, tuple[Callable[..., list[Tensor]], list[tuple[int, ...]], bool]] = {
    "residual, drop path and both norms": (_residual, [SHAPE, SHAPE, (2, WIDTH), (2, WIDTH)], True),
    "depth-wise 5 x 5, norm and GELU": (_depthwise, [SHAPE, (WIDTH, 1, 5, 5), (WIDTH,), (2, WIDTH)], True),
    "GELU again and its gradient": (_gelu, [SHAPE, SHAPE], False),
}


@dataclass(frozen=True)
class StepCheck(Check):
    path: str = ""
    reason: str = ""

    def is_close(self, dtype: torch.dtype) -> bool:
        return all(error < SLACK * LIMITS[dtype] for error in self.errors.values())


def check_step(
    name: str, device: torch.device, dtype: torch.dtype, rounds: int
) -> tuple[StepCheck, float, float]:
    """Errors against plain torch in float64, and seconds of a forward pass and of forward and backward."""
    function, shapes, has_gradient = STEPS[name]
    generator = torch.Generator(device).manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]

    def results(path: str | None, to: torch.dtype) -> list[Tensor]:
        inputs = [leaf.to(to).requires_grad_(has_gradient) for leaf in leaves]
        outputs = function(path, *inputs)
        if not has_gradient:
            return outputs
        gradients = torch.autograd.grad(outputs, inputs, [leaves[0].to(to)] * len(outputs))
        return [*(out.detach() for out in outputs), *gradients]

    found, again = (results(None, dtype) for _ in range(2))
    expected = results("torch", torch.float64)
    errors = {
        f"result {index}": float((a.double() - b).abs().max() / b.abs().max())
        for index, (a, b) in enumerate(zip(found, expected, strict=True))
    }
    is_repeatable = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    choice = choose(leaves[0])

    def forward() -> None:
        with torch.no_grad():
            function(None, *leaves)

    both = seconds(lambda: results(None, dtype), device, rounds)
    return (
        StepCheck(errors, is_repeatable, choice.path, choice.reason),
        seconds(forward, device, rounds),
        both,
    )
