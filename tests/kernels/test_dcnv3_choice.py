"""Does one function choose the DCNv3 implementation, say why, and say it once?"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import pytest
import torch

from pretrain.kernels import dcnv3_choice
from pretrain.kernels.dcnv3 import dcnv3, dcnv3_packed
from pretrain.kernels.dcnv3_choice import Call, choose_path

GPU = Call("cuda", torch.bfloat16, 32)


@pytest.fixture(autouse=True)
def _fresh_look_at_the_machine():
    """What was found out about a pretended machine must not outlive its test."""
    cached = (dcnv3_choice._triton_obstacle, dcnv3_choice._compiler_obstacle)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def serving_gpu(monkeypatch):
    """A machine on which Triton runs."""
    found = functools.cache(lambda device_type: None)
    monkeypatch.setattr(dcnv3_choice, "_triton_obstacle", found)


def test_float64_takes_the_reference_and_the_rest_of_a_cpu_the_sparse_path():
    assert choose_path(Call("cpu", torch.float64, 32)).path == "reference"
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_path(Call("cpu", dtype, 32)).path == "sparse"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_width", [16, 32])
def test_a_gpu_with_triton_takes_the_fused_kernels(serving_gpu, dtype, group_width):
    assert choose_path(Call("cuda", dtype, group_width)).path == "triton"


@pytest.mark.parametrize(
    "change",
    [
        {"group_width": 24},
        {"kernel_size": 5},
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2},
        {"remove_center": True},
        {"is_packed": False},
    ],
)
def test_what_the_fused_kernels_do_not_serve_is_compiled_and_the_reason_names_it(serving_gpu, change):
    choice = choose_path(replace(GPU, **change))
    assert choice.path == "compiled"
    assert next(iter(change)).removeprefix("is_").split("_")[0] in choice.reason


def test_without_triton_and_compiler_a_gpu_takes_the_sparse_path_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(dcnv3_choice.importlib.util, "find_spec", lambda name: None)
    choice = choose_path(GPU)
    assert choice.path == "sparse" and "pip install triton" in choice.reason


def test_a_missing_compiler_is_named_with_its_remedy(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(dcnv3_choice.shutil, "which", lambda name: None)
    value, offset, mask = torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, 3, 18), torch.zeros(1, 3, 3, 9)
    with pytest.raises(ValueError, match=r"none of g\+\+, clang\+\+, c\+\+ is there: install one"):
        dcnv3(value, offset, mask, path="compiled")


def test_the_choice_is_announced_once(caplog):
    dcnv3_choice.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="pretrain.kernels.dcnv3_choice"):
        for _ in range(3):
            choose_path(Call("cpu", torch.float32, 32))
    assert [record.getMessage() for record in caplog.records] == [
        "DCNv3 on cpu in torch.float32: sparse path "
        "(the fastest plain-torch path on a CPU (benchmarks/dcnv3_cpu.py))"
    ]


def test_packed_rows_that_do_not_fit_and_triton_on_a_cpu_are_refused():
    value, packed = torch.zeros(1, 3, 3, 32), torch.zeros(1, 3, 3, 1, 32)
    with pytest.raises(ValueError, match=r"of the same n, h, w"):
        dcnv3_packed(value, packed.expand(1, 3, 3, 3, 32), has_scale=True)
    with pytest.raises(ValueError, match="no CPU backend"):
        dcnv3_packed(value, packed, has_scale=True, path="triton")
