"""What do the Triton kernels give in the interpreter? Prints JSON; run by test_dcnv3_triton.py.

The interpreter must be chosen before Triton is imported, by anybody in the process: hence a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor

from pretrain.kernels import dcnv3_choice, dcnv3_triton
from pretrain.kernels.dcnv3 import dcnv3_packed
from pretrain.kernels.dcnv3_choice import Call
from pretrain.kernels.dcnv3_launch import LARGE
from pretrain.models import internimage_block
from pretrain.models.internimage_block import DCNv3
from pretrain.models.internimage_config import InternImageConfig
from tests.kernels.interpreter import patch_once

patch_once()


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]  # images, height, width, groups
    group_width: int = 32
    dtype: str = "float32"
    spread: float = 1.0  # standard deviation of the offsets, pixels
    offset_scale: float = 1.0
    has_scale: bool = True
    is_atomic: bool = False
    is_banded: bool = False  # take the path of large maps
    logit_spread: float = 1.0


CASES = {
    "group_width_32": Case((2, 5, 7, 2)),
    "group_width_16": Case((2, 5, 7, 2), group_width=16),
    "zero_offsets": Case((1, 6, 6, 1), spread=0.0),
    "far_outside": Case((1, 6, 6, 1), spread=100.0),
    "without_scale": Case((1, 5, 4, 1), has_scale=False, offset_scale=2.0),
    "one_position": Case((1, 1, 1, 1)),
    "large_logits": Case((1, 4, 4, 1), logit_spread=100.0),
    "medium_map": Case((1, 5, 20, 1)),
    "banded": Case((1, 5, 18, 1), spread=1.5, is_banded=True),
    "banded_zero_offsets": Case((2, 5, 9, 1), spread=0.0, is_banded=True, has_scale=False),
    "banded_far_outside": Case((1, 5, 12, 1), group_width=16, spread=30.0, is_banded=True),
    "large_map": Case((1, 4, 65, 1), group_width=16, spread=2.0),
    "atomic": Case((1, 5, 7, 1), is_atomic=True),
    "atomic_without_scale": Case((1, 5, 7, 1), is_atomic=True, has_scale=False, spread=3.0),
    "bfloat16": Case((1, 5, 7, 2), dtype="bfloat16"),
    "bfloat16_group_width_16": Case((1, 5, 7, 2), dtype="bfloat16", group_width=16, has_scale=False),
    "bfloat16_banded": Case((1, 5, 9, 1), dtype="bfloat16", is_banded=True),
    "bfloat16_atomic": Case((1, 5, 5, 1), dtype="bfloat16", is_atomic=True),
    "float16": Case((1, 5, 7, 1), dtype="float16"),
}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Value, packed rows and a gradient of the output, in the case's dtype."""
    generator = torch.Generator().manual_seed(0)
    images, height, width, groups = case.shape
    value, grad = torch.randn(2, images, height, width, groups * case.group_width, generator=generator)
    packed = torch.randn(*case.shape, 32, generator=generator)
    packed[..., :18] *= case.spread
    packed[..., 18:27] *= case.logit_spread
    return tuple(tensor.to(getattr(torch, case.dtype)) for tensor in (value, packed, grad))


def derivatives(case: Case, path: str, value: Tensor, packed: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradient of the value, gradient of the packed rows."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (value, packed)]
    out = dcnv3_packed(
        *leaves,
        offset_scale=case.offset_scale,
        has_scale=case.has_scale,
        is_atomic=case.is_atomic,
        path=path,
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(case: Case) -> dict[str, float]:
    """Greatest error against the float64 reference, over the greatest number of each result."""
    arguments = inputs(case)
    chosen = dcnv3_triton.launch_for
    if case.is_banded:
        dcnv3_triton.launch_for = lambda *key: replace(chosen(*key), grad_value=LARGE)
    found = derivatives(case, "triton", *arguments)
    dcnv3_triton.launch_for = chosen
    expected = derivatives(case, "reference", *(tensor.double() for tensor in arguments))
    names = ("out", "grad_value", "grad_packed")
    return {
        name: float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for name, a, b in zip(names, found, expected, strict=True)
    }


def is_repeatable() -> bool:
    case = Case((1, 5, 9, 1), spread=3.0, is_banded=True)
    first, second = (derivatives(case, "triton", *inputs(case)) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def opcheck() -> dict[str, str]:
    value, packed, _ = inputs(Case((1, 2, 3, 1), group_width=16))
    leaves = (value.requires_grad_(), packed.requires_grad_())
    report = torch.library.opcheck(dcnv3_triton.fused_dcnv3, (*leaves, 1.0, True, False))
    return report | torch.library.opcheck(dcnv3_triton.fused_dcnv3, (*leaves, 2.0, False, True))


def compiled_block_error() -> float:
    """Error of the DCNv3 of a block that takes the fused path, under torch.compile without graph breaks,
    against the same block on the sparse path; outputs and the gradients of all parameters.
    """
    config = InternImageConfig(channels=32, depths=(1, 1), groups=(1, 2), center_feature_scale=True)
    generator = torch.Generator().manual_seed(0)
    block, x = DCNv3(config, stage=0), torch.randn(1, 3, 4, 32, generator=generator)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    found = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = function(x)
        found.append([out.detach(), *torch.autograd.grad(out.sin().sum(), list(block.parameters()))])
        # From here on the block believes to be on a GPU that Triton serves, and has no other path.
        DCNv3._sample = None
        internimage_block.Call = lambda device_type, *rest, **options: Call("cuda", *rest, **options)
        dcnv3_choice._triton_obstacle = lambda device_type: None
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


if __name__ == "__main__":
    print(json.dumps({
        "errors": {name: errors(case) for name, case in CASES.items()},
        "is_repeatable": is_repeatable(),
        "opcheck": opcheck(),
        "compiled_block_error": compiled_block_error(),
    }))  # fmt: skip
