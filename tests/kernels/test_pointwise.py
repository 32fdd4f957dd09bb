"""Do the steps around DCNv3 compute what they say, in plain torch, in the interpreter, and on a GPU if any?"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from pretrain.kernels import pointwise
from pretrain.kernels.dcnv3_choice import triton_obstacle
from pretrain.kernels.pointwise import (
    column_sum,
    depthwise_norm_gelu,
    gelu_again,
    layer_norm,
    residual_norm,
    rows_linear,
)
from tests.kernels.dtypes import dtypes_of
from tests.paths import ROOT


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """What one process in interpreter mode found out: see interpreted_pointwise.py."""
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "tests" / "kernels" / "interpreted_pointwise.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


CASES = (
    "share_gamma_outer_following", "gamma_following", "share_outer_following", "outer", "share_gamma",
    "nothing_but_the_sum", "many_rows_a_program", "a_row_for_a_program", "depthwise_5", "depthwise_3_odd_width",
    "depthwise_5_map_smaller_than_its_kernel", "depthwise_5_one_position", "depthwise_5_many_tiles",
    "depthwise_3_wide", "norm_alone", "norm_of_many_rows",
)  # fmt: skip
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}  # measured 3e-7, 8e-3, 9e-4


@pytest.mark.parametrize(("case", "dtype"), [(case, dtype) for case in CASES for dtype in dtypes_of(case)])
def test_interpreted_kernels_equal_float64(interpreted, case, dtype):
    assert interpreted["errors"][f"{case}-{dtype}"] < LIMITS[dtype]


def test_every_interpreted_case_is_claimed(interpreted):
    assert interpreted["errors"].keys() == {f"{case}-{dtype}" for case in CASES for dtype in dtypes_of(case)}


def test_interpreted_column_sums_equal_float64(interpreted):
    assert interpreted["column_sum"] < 1e-4


def test_interpreted_gelu_and_slope_equal_erf(interpreted):
    assert max(interpreted["gelu"].values()) < 1e-6  # 7.1.26 of Abramowitz and Stegun promises 1.5e-7


def test_two_interpreted_backward_passes_are_bit_identical(interpreted):
    assert interpreted["is_repeatable"]


def test_the_operators_pass_opcheck(interpreted):
    assert set(interpreted["opcheck"].values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ["pre_norm", "post_norm", "res_post_norm"])
def test_a_fused_model_compiles_without_graph_break_and_equals_the_plain_one(interpreted, layout):
    assert interpreted["fused_models"][layout] < 1e-5  # float32; 6e-7 measured


def test_residual_norm_is_the_sum_of_its_parts():
    x, branch, gamma = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8), torch.randn(8)
    outer, following = torch.randn(2, 8), torch.randn(2, 8)
    share = torch.tensor([0.0, 2.0])
    total, normed = residual_norm(x, branch, share=share, gamma=gamma, outer=outer, following=following)
    assert torch.equal(total[0], x[0])  # the first image's branch is dropped
    added = (total[1] - x[1]) / (2 * gamma)
    expected = F.layer_norm(branch[1], (8,), outer[0], outer[1], eps=1e-6)
    assert torch.allclose(added, expected, atol=1e-4)  # a division by gamma, that may be small
    assert torch.allclose(normed, F.layer_norm(total, (8,), following[0], following[1], eps=1e-6))
    assert residual_norm(x, branch)[1] is None
    assert torch.equal(residual_norm(x, branch)[0], x + branch)


def test_depthwise_norm_gelu_sees_its_own_channel_and_neighbours_alone():
    x, weight = torch.zeros(1, 7, 7, 4), torch.zeros(4, 1, 3, 3)
    weight[:, 0, 0, 2] = torch.tensor([1.0, 2.0, 3.0, 5.0])  # reads the neighbour above and to the right
    x[0, 2, 4] = torch.tensor([1.0, 1.0, 1.0, 1.0])
    out = depthwise_norm_gelu(x, weight, torch.zeros(4), torch.stack([torch.ones(4), torch.zeros(4)]))
    expected = F.gelu(F.layer_norm(torch.tensor([1.0, 2.0, 3.0, 5.0]), (4,), eps=1e-6))
    assert torch.allclose(out[0, 3, 3], expected)
    assert out.count_nonzero(-1).count_nonzero() == 1


both_ways = pytest.mark.parametrize("has_gelu", [False, True])


@both_ways
def test_rows_linear_equals_linear(has_gelu):
    torch.manual_seed(0)
    operands = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (4, 3), (4,))]
    found = partial(rows_linear, has_gelu=has_gelu)
    first = F.gelu(operands[0]) if has_gelu else operands[0]
    assert torch.allclose(found(*operands), F.linear(first, *operands[1:]))
    assert torch.autograd.gradcheck(found, operands)


@both_ways
def test_rows_linear_keeps_its_input_alone(has_gelu):
    kept = []
    operands = [torch.randn(*s, requires_grad=True) for s in ((5, 3), (4, 3), (4,))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rows_linear(*operands, has_gelu=has_gelu)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in operands[:2]}


@both_ways
def test_rows_linear_leaves_what_is_frozen_alone(has_gelu):
    x = torch.randn(5, 3, requires_grad=True)
    weight, bias = torch.randn(4, 3), torch.randn(4)
    rows_linear(x, weight, bias, has_gelu=has_gelu).sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None
    x, weight = x.detach(), weight.requires_grad_()
    rows_linear(x, weight, bias, has_gelu=has_gelu).sum().backward()
    assert x.grad is None and weight.grad is not None


@both_ways
def test_rows_linear_trains_under_autocast_as_a_linear_layer_does(has_gelu):
    torch.manual_seed(0)
    operands = [torch.randn(*s, requires_grad=True) for s in ((5, 3), (4, 3), (4,))]
    with torch.autocast("cpu", torch.bfloat16):
        first = F.gelu(operands[0]) if has_gelu else operands[0]
        found, expected = rows_linear(*operands, has_gelu=has_gelu), F.linear(first, *operands[1:])
    assert found.dtype == expected.dtype == torch.bfloat16
    gradients = [torch.autograd.grad(out.float().sum(), operands) for out in (found, expected)]
    assert all(g.dtype == torch.float32 for g in gradients[0])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)  # bfloat16


def test_residual_norm_has_the_dtype_of_its_map_whatever_the_parts_have():
    x, branch = torch.randn(2, 3, 4, 8).bfloat16(), torch.randn(2, 3, 4, 8).bfloat16()
    total, _ = residual_norm(
        x, branch, gamma=torch.randn(8), share=torch.tensor([0.0, 2.0], requires_grad=True)
    )
    assert total.dtype == torch.bfloat16 and not total.requires_grad


@pytest.mark.parametrize(("options", "message"), [
    ({"branch": torch.zeros(1, 3, 4, 8)}, r"branch has shape \(1, 3, 4, 8\), but a map of \(2, 3, 4, 8\)"),
    ({"share": torch.zeros(1)}, r"share has shape \(1,\), .* needs \(2,\)"),
    ({"gamma": torch.zeros(1)}, r"gamma has shape \(1,\), .* needs \(8,\)"),
    ({"following": torch.zeros(3, 8)}, r"following has shape \(3, 8\), .* needs \(2, 8\)"),
    ({"path": "tritn"}, r"path='tritn' is unknown; choose from"),
    ({"path": "triton"}, r"path='triton' cannot run on cpu"),
])  # fmt: skip
def test_what_does_not_fit_a_residual_is_named(options, message):
    x = torch.zeros(2, 3, 4, 8)
    with pytest.raises(ValueError, match=message):  # users have no shape checker before it
        inspect.unwrap(residual_norm)(x, **{"branch": x} | options)


@pytest.mark.parametrize("shape", [(4, 1, 4, 4), (4, 1, 3, 5), (3, 1, 3, 3)])
def test_a_kernel_that_is_not_square_odd_and_of_every_channel_is_refused(shape):
    norm = torch.stack([torch.ones(4), torch.zeros(4)])
    with pytest.raises(ValueError, match=r"depth-wise weight has shape .* needs \[4, 1, k, k\] with odd k"):
        inspect.unwrap(depthwise_norm_gelu)(torch.zeros(1, 6, 6, 4), torch.zeros(shape), torch.zeros(4), norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_cpu_takes_plain_torch(dtype):
    assert pointwise.choose_path(torch.zeros(1, dtype=dtype)) == "torch"


def test_kernel_sizes_that_are_not_published_take_plain_torch(monkeypatch):
    monkeypatch.setattr(pointwise, "choose_path", lambda x: "triton")
    x, norm = torch.randn(1, 9, 9, 4), torch.stack([torch.ones(4), torch.zeros(4)])
    assert depthwise_norm_gelu(x, torch.randn(4, 1, 7, 7), torch.zeros(4), norm).shape == x.shape


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or triton_obstacle("cuda") is not None,
    reason="no GPU that Triton serves is visible",
)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 320, 2560])
def test_kernels_on_the_gpu_equal_plain_torch(width, dtype):
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    share = torch.tensor([0.0, 2.0], device="cuda", dtype=dtype)
    x, weight = normal(2, 9, 11, width), normal(width, 1, 5, 5) / 5
    branch, grad = normal(*x.shape), normal(*x.shape)
    vectors = [normal(width), normal(2, width), normal(2, width)]

    def results(path: str, to: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(to).requires_grad_() for t in (x, branch, *vectors, weight)]
        total, normed = residual_norm(
            *leaves[:2], share=share.to(to), gamma=leaves[2], outer=leaves[3], following=leaves[4], path=path
        )
        out = depthwise_norm_gelu(leaves[0], leaves[5], leaves[2], leaves[3], path=path)
        again = torch.stack(gelu_again(leaves[0].detach(), grad.to(to), path=path))
        outputs = [total, normed, out, layer_norm(leaves[1], leaves[3], path=path)]
        gradients = torch.autograd.grad(outputs, leaves, [grad.to(to)] * 4)
        summed = column_sum(grad.to(to).flatten(0, 2), path=path)
        return [*(output.detach() for output in outputs), again, summed, *gradients]

    limit = 1e-5 if dtype == torch.float32 else 2e-2  # gradients of vectors are sums of rounded numbers
    for found, expected in zip(results("triton", dtype), results("torch", torch.float64), strict=True):
        assert float((found.double() - expected).abs().max() / expected.abs().max()) < limit
