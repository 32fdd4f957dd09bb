"""Is the packed projection safe under ZeRO-3?"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.engine.launch import environment
from tests.paths import ROOT


@pytest.fixture(scope="module")
def found() -> dict:
    script = str(ROOT / "tests" / "models" / "packed_zero3.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("scale", ["scale", "no_scale"])
def test_packed_projection_trains_under_zero3_as_without_and_leaves_no_weight_gathered(found, scale):
    assert found[scale]["resident"] == []
    assert found[scale]["error"] < 1e-6  # float32, three steps of plain gradient descent; 7e-8 measured
