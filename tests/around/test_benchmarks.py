"""Does every benchmark start, and count and call what it claims? What of it can be known here and in seconds."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks import (
    block_memory,
    dcnv3_gpu,
    dense_transfer,
    export_huge,
    internimage_h_gpu,
    loader_drill,
    loader_scale,
    loader_wait,
    transfer,
)
from benchmarks.record import RESULTS, read_record
from pretrain.kernels.dcnv3 import dcnv3
from pretrain.models.internimage_block import Block
from pretrain.models.internimage_config import INTERNIMAGE
from pretrain.plan.tell import MEASURED_VIEW, MEASURED_VIEWS
from pretrain.recipes import load
from tests.paths import ROOT

from torch._subclasses.fake_tensor import FakeTensorMode  # isort: skip


def test_forward_operations_are_those_of_the_published_size():
    # 133.5 GMAC at 192 px of which 0.7 % are depth-wise kernels and sampling; the published 1478 G at 640 px
    # are multiply-adds as well.
    assert internimage_h_gpu.forward_operations(192) == pytest.approx(2 * 133.5e9, rel=0.01)


@pytest.mark.parametrize(("kernel", "group"), [
    ("sample_kernel", "operator"),
    ("grad_value_kernel", "operator"),
    ("depthwise_grad_taps_kernel", "depth-wise, norm and GELU"),
    ("residual_norm_grad_kernel", "residual and norms"),
    ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
    ("triton_red_fused_add_gather_mul_3", "operator"),
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
    ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "other pointwise"),
    ("Memset (Device)", "rest"),
])  # fmt: skip
def test_kernels_are_counted_in_their_group(kernel, group):
    assert internimage_h_gpu.group_of(kernel) == group


def test_fused_blocks_keep_less_for_the_backward_pass_than_plain_and_published_ones():
    with FakeTensorMode():
        block = Block(INTERNIMAGE["internimage_h"], stage=2, drop_path=0.0)
        x = torch.randn(64, 12, 12, 1280, requires_grad=True)
        published = block_memory.kept_values(lambda y: block_memory.published_forward(block, y), block, x)
        plain = block_memory.kept_values(block, block, x)
        with block_memory.as_on_a_gpu():
            fused = block_memory.kept_values(block, block, x)
    assert fused < 0.61 * published  # 13.1 and 21.9 numbers a value
    assert fused < plain < published


def test_a_child_that_has_not_begun_its_program_holds_no_memory_twice():
    alone = export_huge.own_memory(os.getpid())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        with_child = export_huge.own_memory(os.getpid())
    finally:
        os.close(writer), os.close(reader)
        os.waitpid(child, 0)
    assert with_child < 1.2 * alone


def test_the_published_operator_is_called_as_its_extension_wants(monkeypatch):
    calls = []

    def forward(value: Tensor, offset: Tensor, mask: Tensor, *sizes: object) -> Tensor:
        calls.append(sizes)
        return dcnv3(value, offset, mask, groups=2)

    def backward(value: Tensor, offset: Tensor, mask: Tensor, *sizes: object) -> list[Tensor]:
        calls.append(sizes)
        leaves = [tensor.detach().requires_grad_() for tensor in (value, offset, mask)]
        with torch.enable_grad():
            return list(torch.autograd.grad(dcnv3(*leaves, groups=2), leaves, sizes[11]))

    extension = ModuleType("DCNv3")
    extension.__spec__ = importlib.machinery.ModuleSpec("DCNv3", None)
    extension.dcnv3_forward, extension.dcnv3_backward = forward, backward
    monkeypatch.setitem(sys.modules, "DCNv3", extension)
    monkeypatch.setattr(dcnv3_gpu, "version", lambda package: "1.1")
    value, offset, mask = torch.randn(3, 4, 4, 8), torch.randn(3, 4, 4, 36), torch.rand(3, 4, 4, 18)
    leaves = [tensor.requires_grad_() for tensor in (value, offset, mask)]
    out = dcnv3_gpu.published_operator()(*leaves, 2)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(dcnv3(*leaves, groups=2), leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    sizes = (3, 3, 1, 1, 1, 1, 1, 1, 2, 4, 1.0)  # kernel, stride, padding, dilation, groups, width, scale
    assert calls[0] == (*sizes, 3, False)
    assert calls[1][:11] == sizes and calls[1][12:] == (3, False)
    assert torch.equal(calls[1][11], grad)


def test_without_the_package_there_is_no_published_operator():
    assert dcnv3_gpu.published_operator() is None


def test_a_claim_names_what_it_does_not_hold_for() -> None:
    found = {"knn": {"is_clear": True}, "zero_shot": {"is_clear": False}}
    told = transfer.claim(found, [0, 1])
    assert "in 1 of 2 protocols" in told and "seeds 0, 1" in told
    assert told.endswith("not in: zero-shot by class names")


def _start_all(names: list[str]) -> None:
    """Imports the scripts and lets each that has options tell them."""
    warnings.resetwarnings()
    for name in names:
        print("starting", name, flush=True)
        module = importlib.import_module(f"benchmarks.{name}")
        if hasattr(module, "main") and hasattr(module, "argparse"):
            sys.argv = [name, "--help"]
            with pytest.raises(SystemExit, match="0"):
                module.main()


def test_every_benchmark_starts() -> None:
    """All of them in one process, a fork of this one, which has imported torch."""
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    names = [path.stem for path in scripts if "__main__" in path.read_text()]
    assert {"loader", "loader_scale", "shard_builder"} <= set(names)
    process = multiprocessing.get_context("fork").Process(target=_start_all, args=(names,))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        process.start()
    process.join(240)
    assert process.exitcode == 0, "the last that is told to be starting does not"


def test_the_scale_of_the_loader_is_measured_on_few_shards_as_on_many(tmp_path: Path) -> None:
    loader_scale.write_set(tmp_path, 8, 3)
    found = loader_scale.start(tmp_path)
    kept = json.loads((ROOT / "benchmarks/results/loader_scale.json").read_text())
    assert found.keys() == kept["medians"].keys()
    assert all(number > 0 for name, number in found.items() if name.endswith("seconds"))


def test_a_worker_is_measured_with_the_views_that_the_plan_compares_it_by() -> None:
    """Of two views at 224 px a core makes 0.6 times as many images as of M3I's views at 192 px."""
    run, measured = loader_wait.measured_run(), json.loads((RESULTS / "loader.json").read_text())
    assert run.views == load("m3i.vit_b16").views and run.views.size == measured["view"] == MEASURED_VIEW
    assert 1 + sum(run.objective.needs_other_view()) / run.objective.input.mixed == MEASURED_VIEWS


def test_the_slow_disk_of_the_drill_counts_the_reads_that_it_made_late(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(loader_drill.SLOW_READS)
    program = f"import os; file = os.open({__file__!r}, 0); found = [os.pread(file, 3, 0) for _ in range(4)]"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "SLOW_READS": str(tmp_path / "reads")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert (tmp_path / "reads").stat().st_size == 4


def test_the_table_of_transfer_is_that_of_its_record() -> None:
    record = read_record("transfer")
    told = transfer.table(record)
    assert "seeds 0, 1, 2" in told and f"on {record['hardware']}, 1 thread, torch" in told
    assert (RESULTS / "transfer.md").read_text() == told
    assert "| image to caption, R@1 | 2,000 |" in told  # of how many, which recall depends on


def test_transfer_measures_the_rows_that_are_asked_for_and_knn() -> None:
    only = transfer.protocols_of(["few_shot_10_fine_tune", "linear"])
    assert only.rows == ("knn", "linear", "few_shot_10_fine_tune")
    assert only.fine_tune_few[10].updates and not only.fine_tune_few[10].epochs
    whole = transfer.protocols_of()
    assert set(whole.rows) == set(transfer.TITLES) and whole.fine_tune.epochs == 30  # the recipe's own
    with pytest.raises(ValueError, match="--only few_shot: choose from knn, "):
        transfer.protocols_of(["few_shot"])


def test_transfer_keeps_rows_with_their_commit_where_knn_says_the_same() -> None:
    earlier = json.loads((RESULTS / "transfer.json").read_text())["runs"]
    row = {
        "accuracy": 0.5,
        "interval": [0.4, 0.6],
        "n": 9,
        "chance": 0.1,
        "commit": "0" * 40 + "+changes",
        "date": "2026-11-01T10:00:00+00:00",
    }
    now = earlier[1] | {step: earlier[1][step] | {"knn": earlier[1][step]["knn"] | {"commit": "new"}, "linear": row}
                        for step in transfer.STEPS}  # fmt: skip
    found = transfer.joined(earlier, now, ["linear"])
    assert [run["last"]["linear"] == row for run in found] == [False, True, False]
    assert found[1]["last"]["knn"] == earlier[1]["last"]["knn"] and found[::2] == earlier[::2]
    was = earlier[0]["last"]["linear"]["commit"]
    told = transfer.summary(found)["linear"]
    assert told["commits"] == sorted({was, row["commit"]})
    shown = transfer.table(read_record("transfer") | {"runs": found})
    assert f"| 0000000+changes, {was[:7]} |" in shown and "Measured 2026-11-01 to 20" in shown


def test_transfer_joins_no_rows_of_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((RESULTS / "transfer.json").read_text())
    monkeypatch.setattr(transfer.provenance, "hardware", lambda _: record["hardware"])
    monkeypatch.setattr(transfer.provenance, "versions", lambda: record["versions"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: record["threads"])
    assert transfer.recorded() == record["runs"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: record["threads"] + 1)
    with pytest.raises(ValueError, match="the record is of other threads: measure all rows"):
        transfer.recorded()


def test_transfer_joins_no_rows_of_another_run_or_other_data() -> None:
    earlier = json.loads((RESULTS / "transfer.json").read_text())["runs"]
    with pytest.raises(ValueError, match="kNN of seed 0, first, is not the recorded one"):
        transfer.joined(earlier, earlier[1] | {"seed": 0}, ["linear"])
    with pytest.raises(ValueError, match="no run of seed 0 like this one"):
        transfer.joined(earlier, earlier[0] | {"steps": 7}, ["linear"])


def test_a_row_without_an_interval_is_no_clear_gain() -> None:
    """Of a single held-out image."""
    for which in ("first", "last"):
        runs = json.loads((RESULTS / "transfer.json").read_text())["runs"]
        assert transfer.summary(runs)["knn"]["is_clear"]
        runs[1][which]["knn"]["interval"] = None
        assert not transfer.summary(runs)["knn"]["is_clear"]
    cases = dense_transfer.results_of(read_record("dense_transfer"))
    case, metric = next(
        (c, m) for c in cases.values() for m, clear in dense_transfer.clear_of(c).items() if clear
    )
    case["pre-trained"][0][metric]["interval"] = None
    assert not dense_transfer.clear_of(case)[metric]


def test_the_table_of_dense_transfer_is_that_of_its_record() -> None:
    record = read_record("dense_transfer")
    found, told = dense_transfer.results_of(record), dense_transfer.table(record)
    assert found.keys() == dense_transfer.CASES.keys()
    assert record["cases"] == {name: asdict(case) for name, case in dense_transfer.CASES.items()}
    assert (RESULTS / "dense_transfer.md").read_text() == told
    assert f"on {record['hardware']}, 1 thread, torch" in told
    for name, by_backbone in found.items():
        commit = by_backbone["untrained"][0]["commit"]
        assert f"| {name} | " in told and f" | 0, 1, 2 | {commit[:7]} |" in told, name
    assert record["claim"] == dense_transfer.claim_of(found)
