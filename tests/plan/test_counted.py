"""Do memory and traffic of real steps on two ranks agree with the plan?"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

from pretrain.plan.memory import memory
from pretrain.plan.settings import Setting, read
from pretrain.plan.sizes import sizes_of
from pretrain.plan.traffic import traffic
from tests.engine.launch import start
from tests.fakes import FACTS
from tests.paths import ROOT
from tests.plan.counted import OPERATIONS, VARIANTS, counted_run, parts_of

WORLD = 2
TESTED = (
    "zero2",
    "zero3_offload",
    "zero3_released_in_parts",
)  # benchmarks/plan_traffic.py counts all of them, on four too


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("counted")
    codes, output = start(folder, *TESTED, world=WORLD, script=ROOT / "tests" / "plan" / "counted.py")
    assert codes == [0] * WORLD, output
    return json.loads((folder / "result.json").read_text())


def setting_of(variant: str) -> Setting:
    file, changes = VARIANTS[variant]
    return Setting(file, read()[file] | changes, micro_batches=parts_of(variant))


@pytest.mark.parametrize("variant", TESTED)
def test_bytes_by_collective(counted: dict[str, Any], variant: str):
    run = counted_run(WORLD)
    told: dict[str, float] = defaultdict(float)
    for message in traffic(run, FACTS, sizes_of(run, FACTS), setting_of(variant), WORLD):
        told[message.by] += message.bytes
    found: dict[str, float] = defaultdict(float)
    for operation, sent in counted[variant]["sent"].items():
        found[OPERATIONS[operation]] += sent
    assert dict(found) == pytest.approx(dict(told), rel=0.01)


@pytest.mark.parametrize("variant", TESTED)
def test_bytes_of_memory(counted: dict[str, Any], variant: str):
    run = counted_run(WORLD)
    told = memory(run, FACTS, sizes_of(run, FACTS), setting_of(variant), WORLD, is_fused=False)
    assert counted[variant]["at_rest"] == pytest.approx(told.at_rest + told.host, rel=0.1)
    assert counted[variant]["backward"] == pytest.approx(told.backward + told.host, rel=0.1)
    assert counted[variant]["most"] == pytest.approx(told.peak + told.host, rel=0.1)
