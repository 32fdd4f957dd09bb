"""Which runs do the tests of export share?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config import Backbone
from pretrain.export.trained import Trained, read_trained
from pretrain.facts import DataFacts
from pretrain.recipes import load
from tests.evaluate.runs import write_run
from tests.fakes import shrink

FACTS = DataFacts(categories=("apple", "boat", "cat", "door", "egg"), vocab_size=100)


@pytest.fixture(scope="session")
def internimage_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("internimage"), shrink(load("m3i.internimage_h")), FACTS)


@pytest.fixture(scope="session")
def vit_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("vit"), shrink(load("m3i.vit_b16")), FACTS)


@pytest.fixture(scope="session")
def swin_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = replace(load("m3i.vit_b16"), backbone=Backbone("swin", "swin_t", drop_path_schedule="linear"))
    return write_run(tmp_path_factory.mktemp("swin"), shrink(run), FACTS)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone of m3i.demo, three stages, without labels of any kind."""
    run, small = load("m3i.demo"), shrink(load("m3i.demo"))
    run = replace(small, backbone=run.backbone, mask=run.mask, pool=run.pool)
    return write_run(tmp_path_factory.mktemp("demo"), run, DataFacts(categories=(), vocab_size=0), steps=(0,))


def last(run_folder: Path) -> Trained:
    """The teacher of the run's last checkpoint."""
    return read_trained(run_folder, sorted((run_folder / "checkpoints").iterdir())[-1], "teacher")
