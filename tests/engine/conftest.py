"""Which launches do the claims about the engine share? Most of their time is imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.launch import launch

TOLERANCE = 1e-4  # float32 sums in another order, through five AdamW steps


@pytest.fixture(scope="package")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="package")
def ranks(ranks_folder: Path) -> dict[str, Any]:
    """What two ranks found."""
    return launch(
        ranks_folder,
        "compare_stages",
        "average_in_bfloat16",
        "stop_and_resume",
        "refuse_what_is_bad",
        "copy_fails",
    )
