"""Do real ranks find each other, pass where all is well, and name the node that is not like the others?"""

from __future__ import annotations

import json
import os
import socket
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from pretrain.exits import FAILED, FINISHED, LOST
from tests.data.sets import good_set
from tests.engine.launch import together

SOON = "1.5"  # seconds that a node which does not come is waited for
CASES = {  # name -> (ranks of the world, options, what the environment of the second node has besides)
    "healthy": (2, ["--skip", "recipe"], {}),  # which imports the models: tests/plan looks at it
    "broken": (
        2,
        ["--only=arguments,environment,disk,data,clock"],
        {"NCCL_IB_HCA": "x", "NCCL_ALGO": "Ring"},
    ),
    "missing": (3, ["--connect-seconds", SOON], {}),
}


def _arguments(folder: Path, node: int, case: str) -> list[str]:
    """Of the node: in the broken case it has another build of the data set, and a place that cannot be made."""
    is_other = case == "broken" and node == 1
    data = folder / ("other" if is_other else "data")
    out = folder / ("file/out" if is_other else "out")
    sources = [f"labelled={data}", f"captioned={data}"]
    recipe = ["--recipe", "rows.classification_demo", "--batch", "8"]
    return [*recipe, "--data", *sources, "--out", str(out), *CASES[case][1]]


def _on_rank(node: int, folder: str, ports: dict[str, int]) -> None:
    """Every case one after the other, as one of two nodes with a rank each; leaves NODE.json."""
    from pretrain.preflight.__main__ import main

    place, codes = Path(folder), {}
    for case, (world, _, added) in CASES.items():
        environment = {
            "RANK": node, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_SIZE": 1, "CROSS_RANK": node,
            "CROSS_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[case], "DS_ACCELERATOR": "cpu",
            "PREFLIGHT_REPORT": place / f"{case}.json",
        } | (added if node == 1 else {})  # fmt: skip
        os.environ.update({name: str(value) for name, value in environment.items()})
        with (place / f"{case}_{node}.txt").open("w") as file, redirect_stdout(file), redirect_stderr(file):
            codes[case] = main(_arguments(place, node, case))
    (place / f"{node}.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two nodes of a rank each have passed all cases."""
    folder = tmp_path_factory.mktemp("preflight")
    good_set(folder / "data", (9, 8), has_text=False)
    good_set(folder / "other", (9, 7), has_text=False)
    (folder / "file").write_text("")
    ports = {}
    for case in CASES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports[case] = free.getsockname()[1]
    together(_on_rank, str(folder), ports, world=2)
    return folder


def told(folder: Path, case: str) -> tuple[list[int], str, str]:
    """Exit codes by rank, and what both printed."""
    codes = [json.loads((folder / f"{node}.json").read_text())[case] for node in (0, 1)]
    return codes, *((folder / f"{case}_{node}.txt").read_text() for node in (0, 1))


def report(folder: Path, case: str) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads((folder / f"{case}.json").read_text())["checks"]}


def test_nodes_that_are_well_pass(launched: Path) -> None:
    codes, first, second = told(launched, "healthy")
    assert codes == [FINISHED, FINISHED], first + second
    assert first.splitlines()[-1].startswith("preflight of 2 ranks on 2 nodes: fit for training")
    assert not second, "one table is enough"
    checks = report(launched, "healthy")
    assert {name: check["status"] for name, check in checks.items() if check["status"] == "FAILED"} == {}
    for name in ("all_reduce", "links", "reach", "clock", "shared_folder", "data", "matmul"):
        assert checks[name]["status"] in ("ok", "warning"), f"{name} was left out"
    assert not list((launched / "out").iterdir()), "what a check wrote is removed"


def test_a_node_unlike_the_other_is_named_for_all_that_is_wrong_there(launched: Path) -> None:
    codes, first, second = told(launched, "broken")
    assert codes == [FAILED, FAILED]
    wrong = {
        "arguments": "file/out, 1 of 2 have",
        "environment": "NCCL_ALGO=Ring, 1 of 2 have none",
        "disk": "cannot be written (Not a directory)",
        "data": "manifest of labelled=",
    }
    for name, value in wrong.items():
        lines = [line for line in first.splitlines() if line.startswith(f"FAILED {name}: ") and value in line]
        assert lines, f"{name} is not told:\n{first}"
        assert all("(node 1, rank 1): " in line for line in lines)
        assert lines[0] in second, "the node's own log has it too"
    assert report(launched, "broken")["clock"]["status"] == "ok"
    assert "warning environment: node" in first, "a card's name may be a node's own"


def test_a_node_that_does_not_come_is_named(launched: Path) -> None:
    codes, first, second = told(launched, "missing")
    assert codes == [LOST, LOST]  # a node that comes late may come in time the next time
    assert "2 of 3 ranks met at rank 0 on" in first
    assert "missing: node ? (node 2, all its ranks, rank 2)" in first
    assert "PREFLIGHT_CONNECT_SECONDS" in first
    assert "as rank 0 tells" in second
