"""What many tests of the data read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.sets import good_set, write_tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    write_tokenizer(good_set(root / "talk", (8, 4), has_category=False) / "tokenizer")
    return {"names": good_set(root / "names", has_text=False), "talk": root / "talk"}
