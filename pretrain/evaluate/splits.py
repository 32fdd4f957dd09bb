"""Which folder of a DIR teaches, and which one tests? No torch."""

from __future__ import annotations

from pathlib import Path

# Split -> names that its folder may have; the first that is there.
FOLDERS = {"train": ("train",), "heldout": ("heldout", "val", "validation", "test")}
SPLITS = tuple(FOLDERS)


def found_in(data: Path, split: str) -> Path:
    """The first of the folders that may be called so; the expected one where there is none."""
    folders = [data / name for name in FOLDERS[split]]
    return next((folder for folder in folders if folder.is_dir()), folders[0])
