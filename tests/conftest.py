"""What holds in every test: shapes are checked, one thread a process, nothing reaches a hub."""

from __future__ import annotations

import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  the hook below looks it up by name

install_import_hook(["pretrain", "data_prep"], "tests.shapes.checked")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept between runs is kept in a folder of these tests, also by the processes that they start."""
    os.environ["M3I_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
