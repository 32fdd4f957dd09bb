"""Which folders are taken for classes?"""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.evaluate.sets import read_manifests, read_set


@pytest.mark.parametrize(
    ("files", "task"),
    [
        (("images/a.png", "masks/a.png", "classes.txt"), "segment"),
        (("images/a.png", "annotations/a.png"), "segment"),
        (("Images/a.png", "Masks/a.png"), "segment"),
        (("train2017/a.png", "annotations/instances_train2017.json"), "detect"),
        (("images/a.png", "annotations/instances_train.json", "annotations/a.png"), "detect"),
    ],
)
def test_images_beside_masks_or_boxes_are_no_classes(
    files: tuple[str, ...], task: str, tmp_path: Path
) -> None:
    splits = {split: tmp_path / split for split in ("train", "heldout")}
    for split, folder in splits.items():
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{split} {name}")
    with pytest.raises(
        ValueError, match=rf"is no class, .*: measure by `python -m pretrain.transfer {task} "
    ):
        read_manifests(splits)


def test_masks_inside_of_a_class_are_no_images_of_it(tmp_path: Path) -> None:
    for name in ("ant/images/1/a.png", "ant/Masks/1/a.png", "bee/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=r"images in 'ant/images' and masks in 'ant/Masks', .*: take the masks"
    ):
        read_set(tmp_path)
    (tmp_path / "ant" / "Masks").rename(tmp_path / "ant" / "hats")
    assert read_set(tmp_path).num_samples == 3


@pytest.mark.parametrize("names", [("images", "drawings"), ("masks", "hats"), ("annotations", "letters")])
def test_a_class_may_bear_one_of_these_names(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    assert read_set(tmp_path).categories == tuple(sorted(names))
