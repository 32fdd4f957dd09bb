"""Which data and which run do the tests of evaluation share?"""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.facts import DataFacts
from pretrain.recipes import load
from tests.evaluate.runs import write_run
from tests.evaluate.sets import COLORS, write_set
from tests.fakes import shrink


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of train/ (40 images) and heldout/ (20)."""
    folder = tmp_path_factory.mktemp("data")
    write_set(folder / "train", "train", 10)
    write_set(folder / "heldout", "heldout", 5, seed=1)
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run with checkpoints of steps 0 and 3, text, and the categories of `data` in another order."""
    facts = DataFacts(categories=tuple(reversed(COLORS)), vocab_size=200)
    run = shrink(load("m3i.internimage_h"))
    return write_run(tmp_path_factory.mktemp("run"), run, facts, data / "train" / "tokenizer")
