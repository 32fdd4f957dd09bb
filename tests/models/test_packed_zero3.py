"""Is the packed projection safe under ZeRO-3?"""

from __future__ import annotations

import json

import pytest

from tests.engine.launch import start
from tests.paths import ROOT


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    script = ROOT / "tests" / "models" / "packed_zero3.py"
    codes, output = start(tmp_path_factory.mktemp("packed"), world=1, script=script)
    assert codes == [0], output
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("scale", ["scale", "no_scale"])
def test_packed_projection_trains_under_zero3_as_without_and_leaves_no_weight_gathered(found, scale):
    assert found[scale]["resident"] == []
    assert found[scale]["error"] < 1e-6  # float32, three steps of plain gradient descent; 7e-8 measured
