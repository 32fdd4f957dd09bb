"""Is a stranger's folder told as a guide before it takes memory, or is read from elsewhere?"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import DINOv3ViTConfig, DINOv3ViTModel, ViTImageProcessor

from pretrain.models.guides import open_guide
from tests.memory import little_memory
from tests.models.guide_folders import LAYERS, MEAN, STD, open_clip_folder, shaken


def test_an_image_of_more_tokens_than_memory_holds_is_refused(tmp_path: Path) -> None:
    """Positions that are computed explain no weights: 300 kB tell 16 million patches of one pixel."""
    for size, folder in ((4095, tmp_path / "huge"), (32, tmp_path / "small")):
        config = DINOv3ViTConfig(**LAYERS | {"hidden_size": 96}, image_size=size, patch_size=1)
        shaken(lambda config=config: DINOv3ViTModel(config)).save_pretrained(folder)
        ViTImageProcessor(image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)
    told = r"huge takes more than 4 GiB of memory for one image of 4096 pixels"
    with little_memory(), pytest.raises(ValueError, match=told):
        open_guide(tmp_path / "huge")
    assert open_guide(tmp_path / "small").grid == 32


def test_an_image_that_is_too_large_for_an_open_clip_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip_folder(tmp_path / "clip")
    monkeypatch.setattr("pretrain.initial.one_image.MOST_BYTES", 2**14)
    with pytest.raises(ValueError, match=r"clip takes more than .* of memory for one image of 32 pixels"):
        open_guide(tmp_path / "clip")
