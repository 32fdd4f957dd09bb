"""What holds in every test: shapes are checked, one thread a process, nothing reaches a hub."""

from __future__ import annotations

import gc
import os
import socket
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# torch.compile for a CPU: a pool of compilers imports torch once more, and headers that are compiled beforehand, in
# ten seconds, make none of the few compilations faster.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")

import pytest

from tests.shapes import check_packages

gc.disable()  # while modules are imported, which makes millions of objects that stay: a fifth of that time

check_packages("pretrain", "data_prep")

HERE = Path(__file__).resolve().parent


# Files of half a minute or more. They come first, the longest before the others, so that no process is left alone
# with one at the end; pytest-xdist by itself starts those of few tests last, and these have few. The two clusters,
# which start most processes, do not come at once.
LONGEST_FIRST = (
    "jobs/test_slurm.py",
    "engine/test_rows_ranks.py",
    "engine/test_drill.py",
    "kernels/test_dcnv3.py",
    "jobs/test_hosts.py",
    "engine/test_micro_batches.py",
    "engine/test_main.py",
    "kernels/test_pointwise_sass.py",
    "engine/test_m3i_ranks.py",
    "models/test_internimage.py",
    "data_prep/test_drills.py",
    "kernels/test_pointwise.py",
    "data_prep/download/test_drills.py",
    "engine/test_resume.py",
    "engine/test_engine.py",
    "data_prep/sources/test_every_source.py",
    "compare/test_compare.py",
    "kernels/test_dcnv3_triton.py",
    "plan/test_counted.py",
    "data/test_remote.py",
    "kernels/test_dcnv3_sass.py",
    "pretrainer/test_tag_decoder.py",
    "data/test_loader.py",
)


# Files that share what a launch of ranks has found: one process of pytest-xdist takes them all.
TOGETHER = ("engine/test_resume.py", "engine/test_engine.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """Whole files to a process, as --dist loadfile has it, and those of TOGETHER to the same one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER[0] if file.endswith(TOGETHER) else file

    return Scheduling(config, log)


def pytest_collection(session: pytest.Session) -> None:
    """Each process of pytest-xdist begins with another share of the files: what one has compiled the others find."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker is None or session.config.args_source is pytest.Config.ArgsSource.ARGS:
        return
    files = sorted(HERE.rglob("test_*.py"))
    first = int(worker.removeprefix("gw")) * len(files) // count
    for file in files[first:] + files[:first]:
        with suppress(Exception, pytest.skip.Exception):  # told when it is collected
            import_module(".".join(file.relative_to(HERE.parent).with_suffix("").parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the files by LONGEST_FIRST; all else keeps its place."""
    order = {HERE / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    gc.enable()


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
