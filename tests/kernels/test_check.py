"""Does `python -m pretrain.kernels` tell right from wrong, and the GPU benchmark that it needs a GPU?"""

from __future__ import annotations

import importlib.util
import math
import sys
from types import ModuleType

import pytest
import torch

from pretrain.kernels import __main__ as command
from pretrain.kernels import check_steps
from pretrain.kernels import dcnv3 as operator
from pretrain.kernels.check import KINDS, Check, Kind, check, exact_pixels
from pretrain.kernels.check_steps import STEPS
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
    kinds, steps = lines[: len(SMALL)], lines[len(SMALL) :]
    assert [line.split()[0] for line in kinds] == list(SMALL)
    assert all("sparse" in line and "equal" in line and "fastest plain-torch" in line for line in kinds)
    assert [line.startswith(name) for line, name in zip(steps, STEPS, strict=True)] == [True] * len(STEPS)
    assert all(" torch " in line and "equal" in line and "no CPU backend" in line for line in steps)


def test_the_command_fails_where_a_step_differs_from_its_plain_formulation(on_a_cpu, monkeypatch, capsys):
    right = check_steps.gelu_again

    def wrong_in_float32(x, grad, path):
        return [1.01 * out if x.dtype == torch.float32 else out for out in right(x, grad, path=path)]

    monkeypatch.setattr(check_steps, "gelu_again", wrong_in_float32)
    with pytest.raises(SystemExit, match="1 of 5 kinds differ"):
        command.main()
    assert capsys.readouterr().out.count("DIFFERS") == 1


def test_a_quick_check_asks_for_both_group_widths_of_the_fused_kernels_and_the_steps(monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(command, "line", lambda name, kind, *_: asked.update({name: kind}) or True)
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cpu", "--quick"])
    command.main()
    assert {kind.group_width for kind in asked.values()} == {16, 32} and len(asked) == 2
    assert capsys.readouterr().out.count("equal") == len(STEPS)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: out of memory")])
def test_a_quick_check_of_a_device_that_a_run_fills_asks_the_cpu_and_says_so(monkeypatch, capsys, error):
    def line(name, kind, device, *_):
        if device.type != "cpu":
            raise error
        return True

    monkeypatch.setattr(command, "known_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(command, "line", line)
    monkeypatch.setattr(command, "STEPS", {})
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "meta", "--quick"])
    command.main()
    assert "the CPU is checked instead" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "meta"])
    with pytest.raises(SystemExit, match="no memory left"):
        command.main()


def test_a_check_with_a_gradient_that_is_not_a_number_fails():
    report = Check({"out": 1e-7, "grad_value": float("nan"), "rest": 1e-7}, is_repeatable=True)
    assert not report.is_close(torch.float32) and math.isnan(report.largest)


@pytest.mark.parametrize("name", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_named(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", name])
    with pytest.raises(SystemExit, match=f"--device {name} cannot be used here"):
        command.main()


def test_asking_for_a_path_that_serves_nothing_fails(on_a_cpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cpu", "--path", "triton"])
    with pytest.raises(SystemExit, match="serves no kind here, so nothing of DCNv3 was checked"):
        command.main()


def test_the_command_fails_where_a_path_differs_from_the_reference(on_a_cpu, monkeypatch, capsys):
    right = operator.PATHS["sparse"]
    monkeypatch.setitem(operator.PATHS, "sparse", lambda value, x, y, mask: right(value, x + 0.01, y, mask))
    with pytest.raises(SystemExit, match="2 of 5 kinds differ"):
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
