"""Is the repository small, and free of what belongs to a machine?"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

LARGEST = 1_000_000  # bytes


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this copy of the code is no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_is_over_one_megabyte() -> None:
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked()}
    assert sizes
    assert not {name: size for name, size in sizes.items() if size > LARGEST}


def test_no_compiled_or_produced_file_is_tracked() -> None:
    produced = {"__pycache__", ".venv", "runs", "wandb", ".ruff_cache", ".pytest_cache", ".hypothesis"}
    assert not [path for path in tracked() if produced & set(path.relative_to(ROOT).parts[:-1])]
