"""Is a stranger's folder told as a guide before it takes memory, or is read from elsewhere?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import DINOv3ViTConfig, DINOv3ViTModel, ViTImageProcessor

from pretrain.models.guides import open_guide
from tests.memory import little_memory
from tests.models.guide_folders import LAYERS, MEAN, STD, clip_folder, open_clip_folder, shaken


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


FOLDERS = [
    (clip_folder, ("model.safetensors", "config.json", "preprocessor_config.json")),
    (open_clip_folder, ("open_clip_model.safetensors", "open_clip_config.json")),
]


@pytest.mark.parametrize(("write", "names"), FOLDERS, ids=["huggingface", "open_clip"])
def test_a_link_leads_a_guide_to_no_other_folder(
    write: Callable[[Path], Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "guide"
    write(folder)
    for name in names:
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(
            ValueError, match=rf"{name} is a link that leads out of the folder, to .*: copy it"
        ):
            open_guide(folder)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    assert open_guide(folder).grid == 4


@pytest.mark.parametrize(("write", "names"), FOLDERS, ids=["huggingface", "open_clip"])
def test_a_guide_is_opened_where_a_hugging_face_cache_holds_it(
    write: Callable[[Path], Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    folder, cache = tmp_path / "guide", tmp_path / "models--of--someone"
    write(folder)
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "12ab").mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        (cache / "blobs" / f"{number}").write_bytes(file.read_bytes())
        (cache / "snapshots" / "12ab" / file.name).symlink_to(f"../../blobs/{number}")
    assert open_guide(cache / "snapshots" / "12ab").sha256 == open_guide(folder).sha256
