"""Are types and shapes checked in tests, and libraries left as they are?"""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from pretrain.evaluate.fine_tune_order import own_pairs
from pretrain.evaluate.regions import iou
from tests.paths import ROOT


def test_a_wrong_shape_is_noticed():
    with pytest.raises(TypeCheckError):
        iou(torch.zeros(2, 4))  # intersection, union and truth are 3


def test_checks_draw_nothing_from_the_global_generator():
    state = random.getstate()
    own_pairs([3, 1, 4, 1])
    assert random.getstate() == state


def test_what_a_checked_package_imports_keeps_its_own_compiled_file():
    script = (
        "from tests.shapes import check_packages\n"
        "check_packages('tests.around.importer')\n"
        "from tests.around import importer\n"
        "print(importer.tomllib.__cached__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "jaxtyping" not in done.stdout and done.stdout.strip().endswith(".pyc")
