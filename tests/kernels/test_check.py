"""Does `python -m pretrain.kernels` tell right from wrong, and the GPU benchmark that it needs a GPU?"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from pretrain.kernels import __main__ as command
from pretrain.kernels import dcnv3 as operator
from pretrain.kernels.check import KINDS, Kind, check, exact_pixels
from tests.paths import ROOT

SMALL = {
    "packed": Kind(1, 4, 2, 16),
    "plain": Kind(1, 6, 2, 8, options={"kernel_size": 5, "stride": 2, "padding": 2}),
}


@pytest.fixture
def on_a_cpu(monkeypatch) -> None:
    monkeypatch.setattr(command, "KINDS", SMALL)
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cpu"])


def test_the_command_names_path_and_reason_of_every_kind(on_a_cpu, capsys):
    command.main()
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SMALL)
    assert all("sparse" in line and "equal" in line and "fastest plain-torch" in line for line in lines)


def test_the_command_fails_where_a_path_differs_from_the_reference(on_a_cpu, monkeypatch, capsys):
    right = operator.PATHS["sparse"]
    monkeypatch.setitem(operator.PATHS, "sparse", lambda value, x, y, mask: right(value, x + 0.01, y, mask))
    with pytest.raises(SystemExit, match="2 of 2 kinds differ"):
        command.main()
    assert capsys.readouterr().out.count("DIFFERS") == 2


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_operands_that_fit_in_every_dtype(name):
    small = Kind(**vars(KINDS[name]) | {"images": 1, "side": 5, "groups": 1})
    for dtype in (torch.float32, torch.bfloat16):
        report = check(small, torch.device("cpu"), dtype, "sparse")
        assert report.is_close(dtype) and report.is_repeatable, report


def test_exact_pixels_stay_what_they_are_in_bfloat16():
    offset = exact_pixels(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(offset.bfloat16().float(), offset)


@pytest.fixture
def benchmark() -> ModuleType:
    path = ROOT / "benchmarks" / "dcnv3_gpu.py"
    spec = importlib.util.spec_from_file_location("dcnv3_gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_benchmark_says_that_there_is_no_gpu(benchmark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["dcnv3_gpu"])
    with pytest.raises(SystemExit, match="no GPU is visible: nothing was measured"):
        benchmark.main()


def test_the_bandwidth_bound_counts_every_operand_once(benchmark):
    moved = benchmark.moved_bytes(Kind(64, 48, 10, 32), itemsize=2)
    tensor = 64 * 48 * 48 * 320 * 2  # bytes of the value; packed rows of 32-wide groups are as large
    assert moved == {"forward": 3 * tensor, "forward_and_backward": 8 * tensor}
