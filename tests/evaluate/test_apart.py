"""Are sets refused whose images teach and test at once, however they are linked or copied?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pretrain.evaluate import apart
from pretrain.evaluate.apart import resolved
from pretrain.evaluate.sets import read_manifests


def class_folders(place: Path, split: str) -> Path:
    for name in ("cats", "dogs"):
        (place / split / name).mkdir(parents=True)
        for number in range(2):
            (place / split / name / f"{number}.png").write_bytes(f"{split}, {name}, {number}".encode())
    return place / split


def test_class_folders_that_share_files_are_refused(tmp_path: Path) -> None:
    folders = {split: class_folders(tmp_path, split) for split in ("train", "heldout")}
    assert {manifest.num_samples for manifest in read_manifests(folders).values()} == {4}
    linked = folders["heldout"] / "cats" / "0.png"
    linked.unlink()
    linked.symlink_to(folders["train"] / "cats" / "1.png")
    with pytest.raises(ValueError, match=r"1 image files in common, such as .*train/cats/1\.png: .*two sets"):
        read_manifests(folders)
    shutil.rmtree(folders["heldout"] / "dogs")
    (folders["heldout"] / "dogs").symlink_to(folders["train"] / "dogs")
    with pytest.raises(ValueError, match=r"3 image files in common, such as .*train/cats/1\.png: scores on"):
        read_manifests(folders)


def test_shards_that_were_copied_are_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train", tmp_path / "heldout")
    with pytest.raises(
        ValueError, match=r"1 image files in common, such as .*heldout/000000\.tar: scores on"
    ):
        read_manifests({"train": data / "train", "heldout": tmp_path / "heldout"})


def test_links_are_followed_through_folders_and_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").touch()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "1.png").symlink_to("0.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "b" / "1.png")
    found = resolved([tmp_path / "b" / "0.png", str(tmp_path / "b" / "1.png"), tmp_path / "2.png"])
    assert set(found) == {os.path.realpath(tmp_path / "a" / "0.png")}


def test_hard_links_and_copies_are_refused_and_few_copies_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {split: class_folders(tmp_path, split) for split in ("train", "heldout")}
    taught, tested = folders["train"] / "dogs" / "0.png", folders["heldout"] / "cats" / "1.png"
    taught.write_bytes(b"a" * 10**5)
    tested.write_bytes(b"b" + b"a" * (10**5 - 1))  # of one size, and one end
    read_manifests(folders)
    tested.unlink()
    tested.hardlink_to(taught)
    with pytest.raises(
        ValueError, match=r"1 image files in common by hard links, such as .*cats/1\.png: .*two sets"
    ):
        read_manifests(folders)
    tested.unlink()
    shutil.copyfile(taught, tested)
    with pytest.raises(
        ValueError, match=r"1 image files of equal bytes \(of 4 that test\), such as .*cats/1\.png"
    ):
        read_manifests(folders)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("pretrain.evaluate.apart.MOST_COPIES", 0.25)
    read_manifests(folders)
    assert (
        "warning: 1 of 4 images that test have taught too, byte by byte, such as" in capsys.readouterr().err
    )
    monkeypatch.setattr("pretrain.evaluate.apart.SECONDS", -1.0)
    read_manifests(folders)
    told = capsys.readouterr()
    assert "among 0 of 4 images that teach" in told.out and not told.err


def test_files_of_one_size_are_each_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, end_of = [], apart._end_of
    monkeypatch.setattr(apart, "_end_of", lambda path: read.append(path) or end_of(path))
    names = {split: [tmp_path / f"{split}{number:03d}" for number in range(100)] for split in "ab"}
    for path in (*names["a"], *names["b"]):
        path.write_bytes(path.name.encode())
    apart.require_apart(resolved(names["a"]), resolved(names["b"]))
    assert sorted(read) == sorted(map(str, (*names["a"], *names["b"])))
