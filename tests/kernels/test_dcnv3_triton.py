"""Do the Triton kernels compute the reference, forward and backward? In the interpreter, and on a GPU if any."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from pretrain.kernels.check import Kind, check
from pretrain.kernels.dcnv3_choice import triton_obstacle
from tests.paths import ROOT

pytest.importorskip("triton")

CASES = (
    "group_width_32", "group_width_16", "zero_offsets", "far_outside", "without_scale", "one_position",
    "large_logits", "medium_map", "banded", "banded_zero_offsets", "banded_far_outside", "large_map", "atomic",
    "atomic_without_scale", "bfloat16", "bfloat16_group_width_16", "bfloat16_banded", "bfloat16_atomic", "float16",
)  # fmt: skip


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """What one process in interpreter mode found out: see interpreted.py."""
    command = [sys.executable, str(ROOT / "tests" / "kernels" / "interpreted.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_equal_the_float64_reference(interpreted, case):
    limit = 1e-2 if "float16" in case else 1e-5  # rounding of the dtype: 5e-3 and 7e-7 measured
    assert interpreted["errors"][case].keys() == {"out", "grad_value", "grad_packed"}
    assert max(interpreted["errors"][case].values()) < limit, interpreted["errors"][case]


def test_every_interpreted_case_is_claimed(interpreted):
    assert interpreted["errors"].keys() == set(CASES)


def test_two_deterministic_backward_passes_are_bit_identical(interpreted):
    assert interpreted["is_repeatable"]


def test_the_operator_passes_opcheck(interpreted):
    assert set(interpreted["opcheck"].values()) == {"SUCCESS"}


def test_a_fused_block_compiles_without_graph_break_and_equals_the_sparse_path(interpreted):
    assert interpreted["compiled_block_error"] < 1e-5  # float32; 1e-6 measured


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or triton_obstacle("cuda") is not None,
    reason="no GPU that Triton serves is visible",
)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_width", [16, 32])
@pytest.mark.parametrize("side", [48, 24, 12, 6])
def test_kernels_on_the_gpu_equal_the_reference_and_repeat(side, group_width, dtype):
    kind = Kind(2, side, 4, group_width)
    report = check(kind, torch.device("cuda"), dtype, "triton")
    assert report.is_close(dtype) and report.is_repeatable, report
