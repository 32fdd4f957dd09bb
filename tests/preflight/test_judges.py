"""Is what three nodes say judged rightly, and is the one of them named that is not well?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.exits import FAILED as FAILED_CODE
from pretrain.preflight import tell
from pretrain.preflight.check import judge
from pretrain.preflight.checks import CHECKS
from pretrain.preflight.options import Options
from pretrain.preflight.told import FAILED, WARNING, Told
from tests.preflight.here import place, three_nodes, told

GIB = 2**30
RANKS = {"world": 3, "ranks of a node": 1, "nodes": 3}
VERSIONS = {
    "Python": "3.11.7",
    "torch": "2.15.0",
    "deepspeed": "0.19.8",
    "commit": "abc",
    "other packages": "x",
    "unlike_requirements": {},
}
GPU = {"name": "H100", "uuid": "", "seen": 1, "used": GIB, "total": 80 * GIB, "faults": {}}
TIMES = [[0.0, 1.0], [2.0, 2.01]]
CLOCK = {"times": TIMES, "steps_back": 0, "share": 1.0}
LOST = {"0": "10.0.0.1: refused", "1": "10.0.0.2: refused"}
SET = {"manifest": "1" * 64, "shards": 9, "samples": 1000}
DATA = {"sources": {"a": SET}}
OTHER_DATA = {"sources": {"a": SET | {"manifest": "2" * 64}}}


@dataclass(frozen=True)
class Case:
    """A check, what a node says that is well, what the last one says that is not, and what is told of it."""

    name: str
    well: Any
    unwell: dict[str, Any]  # in place of what is in `well`
    message: str
    status: str = FAILED


CASES = [
    Case("ranks", RANKS, {"ranks of a node": 8}, "ranks of a node=8, 2 of 3 have 1"),
    Case("arguments", {"recipe": "a" * 64, "out": "/x"}, {"out": "/y"}, "out=/y, 2 of 3 have /x"),
    Case("arguments", {"recipe": "a" * 64}, {"recipe": "b" * 64}, "recipe=bbbbbbbbbbbb, 2 of 3 have aaaaaaaaaaaa"),
    Case("arguments", {"data": "a=/x"}, {"data": "a=/y"}, "--data=a=/y", WARNING),
    Case("versions", VERSIONS, {"torch": "2.14.0"}, "torch=2.14.0, 2 of 3 have 2.15.0"),
    Case("versions", VERSIONS, {"commit": "abd"}, "commit=abd, 2 of 3 have abc"),
    Case("versions", VERSIONS, {"other packages": "y"}, "other packages=y"),
    Case("versions", VERSIONS, {"unlike_requirements": {"timm": "1"}}, 'unlike requirements.txt: {"timm": "1"}'),
    Case("environment", {"NCCL_ALGO": "Ring"}, {"NCCL_ALGO": "Tree"}, "NCCL_ALGO=Tree, 2 of 3 have Ring"),
    Case("environment", {}, {"GLOO_SOCKET_IFNAME": "lo"}, "GLOO_SOCKET_IFNAME=lo"),
    Case("environment", {"NCCL_IB_HCA": "a"}, {"NCCL_IB_HCA": "b"}, "NCCL_IB_HCA=b", WARNING),
    Case("gpu", GPU, {"used": 3 * GIB}, "3.0 GiB of the GPU are taken"),
    Case("gpu", GPU, {"faults": {"GPU-b": ["GPU 1: 2 uncorrected ECC errors"]}}, "2 uncorrected ECC errors"),
    Case("gpu", GPU, {"faults": {"GPU-b": ["GPU 1: throttled (hw_slowdown)"]}}, "throttled", WARNING),
    Case("gpu", GPU, {"faults": None}, "nvidia-smi cannot be asked", WARNING),
    Case("gpu", GPU, {"name": "A100"}, "A100, others H100", WARNING),
    Case("matmul", {"wrong": {}, "teraflops": 600.0, "is_gpu": True}, {"teraflops": 290.0}, "slow GPU: 290 TFLOP/s"),
    Case("matmul", {"wrong": {}, "teraflops": 600.0, "is_gpu": True}, {"teraflops": 400.0}, "slow GPU", WARNING),
    Case("matmul", {"wrong": {}, "teraflops": 0.1, "is_gpu": False}, {"teraflops": 0.01}, "slow processor", WARNING),
    Case(
        "matmul",
        {"wrong": {}, "teraflops": 600.0, "is_gpu": True},
        {"wrong": {"torch.bfloat16": 3}},
        "3 numbers of a bfloat16 product are wrong",
    ),
    Case("kernels", {"wrong": {}}, {"wrong": {"H stage 3": 0.5}}, "DCNv3 H stage 3 differs"),
    Case("shm", {"free": 8 * GIB, "wanted": 2 * GIB, "files": 0}, {"free": 64 * 2**20}, "64 MiB free in /dev/shm"),
    Case("open_files", {"limit": 1048576, "hard": 1048576}, {"limit": 256}, "256 open files a process"),
    Case("open_files", {"limit": 1048576, "hard": 1048576}, {"limit": 1024}, "1024 open files", WARNING),
    Case("locked_memory", {"limit": 2.0**63, "cards": ["mlx5_0"]}, {"limit": 65536}, "64 KiB may be locked"),
    Case("processors", {"cores": 8, "workers": 4}, {"cores": 2}, "2 cores for 1 ranks with 4 workers each", WARNING),
    Case("processors", {"cores": 200, "workers": 100}, {"cores": 2}, "2 cores for 1 ranks with 100 workers each"),
    Case("memory", {"available": 64 * GIB, "wanted": 5 * GIB}, {"available": GIB}, "1.0 GiB of memory", WARNING),
    Case("reach", {"lost": {}, "seconds": 0.1, "address": "x"}, {"lost": LOST}, "does not reach node bee (node 1"),
    Case("all_reduce", {"gb_s": 1.0, "wrong": 0, "backend": "gloo"}, {"wrong": 5}, "5 numbers of the sum are wrong"),
    Case("links", {"gb_s": 10.0, "wrong": 0, "from": 0}, {"wrong": 7}, "7 numbers came wrong from rank 0"),
    Case("links", {"gb_s": 10.0, "wrong": 0, "from": 0}, {"gb_s": 2.0}, "2 GB/s from node ant (node 0", WARNING),
    Case("clock", CLOCK, {"times": [[-9.0, -8.0], [-7.0, -6.99]]}, "its clock is -9.000 s from the others'"),
    Case("clock", CLOCK, {"steps_back": 1}, "steps back"),
    Case("disk", {"--out": 50 * GIB}, {"--out": GIB // 2}, "512 MiB free for --out"),
    Case("disk", {"--out": 50 * GIB}, {"--out": 12 * GIB}, "12.0 GiB free for --out", WARNING),
    Case("shared_folder", {"--out": 0.1}, {"--out": None}, "a file of the first node in --out is not seen here"),
    Case("data", DATA, OTHER_DATA, "manifest of a=222222222222, 2 of 3 have 1111"),
]  # fmt: skip
ONE_ERROR = ("recipe", "store")  # fail by the error that looking raises


def _here(folder: Path) -> Any:
    here = three_nodes(folder)
    here.model = {"parameters": 1e9, "checkpoint": 10 * GIB, "host": 0.0}
    return here


def _ranks(name: str, values: list[Any]) -> list[Told]:
    if name == "ranks":
        values = [value | {"expected node": node} for node, value in enumerate(values)]
    return [Told(one.place, {name: {"value": one.value}}) for one in told(*values)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}: {case.message[:40]}")
def test_a_node_that_is_not_well_is_named(case: Case, tmp_path: Path) -> None:
    here, check, well = _here(tmp_path), CHECKS[case.name], case.well
    fine = judge(case.name, check, _ranks(case.name, [well] * 3), here)
    assert (fine.status, fine.problems) == ("ok", ()), "three nodes that are well"
    row = judge(case.name, check, _ranks(case.name, [well, well, well | case.unwell]), here)
    assert row.status == case.status, row
    assert {problem.place for problem in row.problems} == {place(2)}, row.problems
    lines = tell.problem_lines([row], case.status)
    assert any(
        line.startswith(f"{case.status} {case.name}: node bee (node 2, rank 2): ")
        and case.message in line
        and "; rule: " in line
        and "; remedy: " in line
        for line in lines
    ), lines


def test_every_check_has_a_case() -> None:
    assert {case.name for case in CASES} | set(ONE_ERROR) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_an_error_on_one_node_is_a_failure_of_its_check_and_names_the_node(name: str, tmp_path: Path) -> None:
    error = {"error": "RuntimeError: broken (x.py:7)", "remedy": "look there"}
    row = judge(name, CHECKS[name], [Told(place(1), {name: error})], _here(tmp_path))
    assert row.status == FAILED
    [line] = tell.problem_lines([row], FAILED)
    assert line.startswith(f"FAILED {name}: node bee (node 1, rank 1): RuntimeError: broken (x.py:7); rule: ")


def test_a_judge_that_is_told_nonsense_fails_its_check_alone(tmp_path: Path) -> None:
    row = judge("shm", CHECKS["shm"], [Told(place(0), {"shm": {"value": {"fre": 1}}})], _here(tmp_path))
    assert row.status == FAILED
    assert "KeyError: 'wanted'" in tell.problem_lines([row], FAILED)[0]


def test_a_slow_node_is_named_by_both_of_its_links(tmp_path: Path) -> None:
    speeds = [
        {"gb_s": gb_s, "wrong": 0, "from": (node - 1) % 3} for node, gb_s in enumerate((1.0, 10.0, 1.0))
    ]
    slow = {"gb_s": 10.0, "wrong": 0, "from": 0}
    judged = CHECKS["links"].judge([*told(*speeds), *told(slow, slow)], _here(tmp_path))
    assert {problem.place for problem in judged.problems} == {place(2)}, "into it and out of it"


def test_an_all_reduce_that_is_slow_is_told_and_asked_bandwidth_fails(tmp_path: Path) -> None:
    here = _here(tmp_path)
    values = told(*[{"gb_s": 0.05, "wrong": 0, "backend": "gloo"}] * 3)
    assert [problem.status for problem in CHECKS["all_reduce"].judge(values, here).problems] == [WARNING]
    here.options = Options(min_gb_s=0.2)
    assert [problem.status for problem in CHECKS["all_reduce"].judge(values, here).problems] == [FAILED]


def test_two_ranks_on_one_gpu_are_both_named(tmp_path: Path) -> None:
    ranks = [Told(replace(place(1), rank=rank), GPU | {"uuid": "GPU-7"}) for rank in (1, 2)]
    problems = CHECKS["gpu"].judge(ranks, _here(tmp_path)).problems
    assert [problem.place.rank for problem in problems] == [1, 2]


def test_the_same_problem_of_many_nodes_is_one_line(tmp_path: Path) -> None:
    values = told(*[{"free": 0, "wanted": GIB, "files": 0}] * 3)
    row = judge(
        "shm",
        CHECKS["shm"],
        [Told(one.place, {"shm": {"value": one.value}}) for one in values],
        _here(tmp_path),
    )
    [line] = tell.problem_lines([row], FAILED)
    assert (
        "node ant (node 0, rank 0), node bee (node 1, rank 1), node bee (node 2, rank 2): 0 MiB free" in line
    )
    assert FAILED in tell.table([row], 140)
    assert FAILED_CODE == 1
