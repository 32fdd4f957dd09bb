"""What do the Triton kernels around DCNv3 give in the interpreter? Prints JSON; run by test_pointwise.py.

The interpreter must be chosen before Triton is imported, by anybody in the process: hence a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor

from pretrain.kernels import dcnv3_choice, pointwise, pointwise_launch, pointwise_triton, residual_triton
from pretrain.kernels.triton_norm import add_pairs
from pretrain.models import internimage_block
from pretrain.models.internimage import InternImage
from pretrain.models.internimage_config import InternImageConfig
from tests.kernels.dtypes import dtypes_of
from tests.kernels.interpreter import patch_once, sum_pairs_at_once

patch_once()

# So few programs that each takes several tiles, as on large maps.
pointwise_launch.GRAD_PROGRAMS, pointwise_launch.ROWS_A_PROGRAM, pointwise_triton.TAP_PROGRAMS = 2, 1, 10

Function = Callable[..., list[Tensor]]  # (path, *leaves) -> outputs
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


SHARE = (0.0, 1.25, 1.25)
PARTS = ("gamma", "outer", "following")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def derivatives(function: Function, path: str, leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of all leaves."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = function(path, *leaves)
    grads = [normal(*out.shape, seed=7).to(leaves[0].dtype) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def error(function: Function, leaves: list[Tensor]) -> float:
    """Greatest error of any result against the float64 reference, over the greatest number of that result."""
    found = derivatives(function, "triton", leaves)
    expected = derivatives(function, "torch", [leaf.double() for leaf in leaves])
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for a, b in zip(found, expected, strict=True)
    )


def residual_case(parts: tuple[str, ...], has_share: bool, shape: tuple[int, ...] = (3, 3, 2, 48)):
    def function(path: str, x: Tensor, branch: Tensor, *vectors: Tensor) -> list[Tensor]:
        share = torch.tensor(SHARE, dtype=x.dtype) if has_share else None
        options = dict(zip(parts, vectors, strict=True))
        results = pointwise.residual_norm(x, branch, share=share, path=path, **options)
        return [result for result in results if result is not None]

    width = shape[-1]
    vectors = [normal(width) if part == "gamma" else normal(2, width) for part in parts]
    return function, [normal(*shape), 3 * normal(*shape, seed=1) + 1, *vectors]


def depthwise_case(size: int, shape: tuple[int, int, int, int]):
    def function(path: str, *leaves: Tensor) -> list[Tensor]:
        return [pointwise.depthwise_norm_gelu(*leaves, path=path)]

    width = shape[-1]
    weight = normal(width, 1, size, size) / size
    return function, [normal(*shape), weight, normal(width), normal(2, width)]


def norm_case(*shape: int):
    def function(path: str, *leaves: Tensor) -> list[Tensor]:
        return [pointwise.layer_norm(*leaves, path=path)]

    return function, [3 * normal(*shape) + 1, normal(2, shape[-1])]


CASES = {
    "norm_alone": norm_case(3, 3, 2, 48),
    "norm_of_many_rows": norm_case(429, 16),
    "share_gamma_outer_following": residual_case(PARTS, True),
    "gamma_following": residual_case(("gamma", "following"), False),
    "share_outer_following": residual_case(("outer", "following"), True),
    "outer": residual_case(("outer",), False),
    "share_gamma": residual_case(("gamma",), True),
    "nothing_but_the_sum": residual_case((), False),
    "many_rows_a_program": residual_case(PARTS, True, (3, 13, 11, 16)),
    "a_row_for_a_program": residual_case(PARTS, True, (3, 1, 2, 1040)),
    "depthwise_5": depthwise_case(5, (2, 5, 4, 32)),
    "depthwise_3_odd_width": depthwise_case(3, (1, 3, 7, 48)),
    "depthwise_5_map_smaller_than_its_kernel": depthwise_case(5, (1, 2, 2, 16)),
    "depthwise_5_one_position": depthwise_case(5, (1, 1, 1, 16)),
    "depthwise_5_many_tiles": depthwise_case(5, (3, 7, 11, 16)),
    "depthwise_3_wide": depthwise_case(3, (1, 5, 6, 128)),
}


def column_sum_error() -> float:
    """Greatest error of sums over more rows than one program adds, and over widths that are no power of 2."""
    matrices = [normal(rows, width) for rows, width in ((1, 3), (70, 33), (2300, 160))]
    found = [pointwise.column_sum(matrix, path="triton") for matrix in matrices]
    return max(
        float((a - matrix.double().sum(0)).abs().max()) for a, matrix in zip(found, matrices, strict=True)
    )


def gelu_errors() -> dict[str, float]:
    """Greatest error of gelu and of its gradient from -12 to 12, over the greatest number of each."""
    x = torch.linspace(-12, 12, 4001)
    grad = normal(4001)
    found = pointwise.gelu_again(x, grad, path="triton")
    expected = pointwise.gelu_again(x.double(), grad.double(), path="torch")
    return {
        name: float((a - b).abs().max() / b.abs().max())
        for name, a, b in zip(("gelu", "slope"), found, expected, strict=True)
    }


def is_repeatable() -> bool:
    function, leaves = depthwise_case(3, (2, 6, 6, 32))
    first, second = (derivatives(function, "triton", leaves) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def opcheck() -> dict[str, str]:
    x, branch = normal(1, 2, 3, 16).requires_grad_(), normal(1, 2, 3, 16, seed=1).requires_grad_()
    gamma, norm, share = (t.requires_grad_() for t in (normal(16), normal(2, 16), torch.ones(1)))
    share = share.detach()
    found = torch.library.opcheck(
        residual_triton.residual_norm, (x, branch, share, gamma, norm, norm.detach().clone(), 1e-6)
    )
    found |= torch.library.opcheck(residual_triton.layer_norm, (x, norm, 1e-6))
    found |= torch.library.opcheck(pointwise_triton.column_sum, (x.detach().flatten(0, 2),))
    found |= torch.library.opcheck(residual_triton.residual_norm, (x, branch, None, None, norm, None, 1e-6))
    taps = normal(9, 16).requires_grad_()
    found |= torch.library.opcheck(pointwise_triton.depthwise_norm_gelu, (x, taps, gamma, norm, 1e-6))
    return found | torch.library.opcheck(pointwise_triton.gelu_grad, (x.detach(), branch.detach()))


def fused_model_errors() -> dict[str, float]:
    """Layout of the blocks -> error of a model whose blocks take the fused kernels, compiled without a graph
    break, against the plain model: outputs and gradients of all parameters.
    """
    layouts = {
        "pre_norm": {"layer_scale": 1.0},
        "post_norm": {"layer_scale": 1.0, "post_norm": True},
        "res_post_norm": {"res_post_norm": True, "center_feature_scale": True, "dw_kernel_size": 5},
    }
    models = {}
    for name, options in layouts.items():
        config = InternImageConfig(channels=32, depths=(1, 1), groups=(1, 2), **options)
        model = InternImage(config)
        del model.levels[1].blocks[0]  # half of the time; it differs by its widths alone
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        models[name] = model
    images = normal(2, 3, 16, 16)

    def results(model: torch.nn.Module) -> list[Tensor]:
        maps = model(images)
        loss = sum(stage_map.sin().sum() for stage_map in maps)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return [stage_map.detach() for stage_map in maps] + list(gradients)

    plain = {name: results(model) for name, model in models.items()}
    # From here on blocks believe to be on a GPU that Triton serves.
    internimage_block.Call = lambda device_type, *rest, **options: dcnv3_choice.Call("cuda", *rest, **options)
    dcnv3_choice._triton_obstacle = lambda device_type: None
    pointwise.choose_path = lambda x: "triton"
    compiled = {
        name: results(torch.compile(model, fullgraph=True, backend="aot_eager"))
        for name, model in models.items()
    }
    return {
        name: max(
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-2))
            for a, b in zip(compiled[name], plain[name], strict=True)
        )
        for name in models
    }


if __name__ == "__main__":
    errors = {}
    for name, (function, leaves) in CASES.items():
        for dtype in dtypes_of(name):
            errors[f"{name}-{dtype}"] = error(function, [leaf.to(DTYPES[dtype]) for leaf in leaves])
        if name == "norm_alone":  # it has shown what the interpreter itself makes of pairs
            sum_pairs_at_once(add_pairs)
    print(json.dumps({
        "errors": errors,
        "gelu": gelu_errors(),
        "column_sum": column_sum_error(),
        "is_repeatable": is_repeatable(),
        "opcheck": opcheck(),
        "fused_models": fused_model_errors(),
    }))  # fmt: skip
