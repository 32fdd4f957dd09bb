"""Is a damaged data set what it was after a repair, and is nothing put in place that is not proved?"""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path

import pytest

from data_prep.__main__ import main
from tests.data_prep.pictures import encoded, picture

NUM = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A collection of two splits with captions."""
    above = tmp_path_factory.mktemp("images") / "mine"
    for split in ("train", "val"):
        (above / split).mkdir(parents=True)
        lines = ["image\tcaption"]
        for number in range(NUM):
            content = encoded(picture(number + 100 * (split == "val"), (48, 40)))
            (above / split / f"{number}.jpg").write_bytes(content)
            lines.append(f"{number}.jpg\ta picture of the number {number}")
        (above / split / "captions.tsv").write_text("\n".join(lines) + "\n")
    return above


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    command = [
        "build",
        "folder",
        "--from",
        str(images),
        "--out",
        str(out),
        "--shard-size",
        "3",
        "--workers",
        "1",
    ]
    assert main(command) == 0
    return out


@pytest.fixture
def damaged(whole, tmp_path) -> Path:
    """A shard gone, one changed in a bit, one cut, an index gone, and no tokenizer."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (out / "train" / "000000.tar").unlink()
    content = bytearray((out / "train" / "000001.tar").read_bytes())
    content[700] ^= 1
    (out / "train" / "000001.tar").write_bytes(content)
    (out / "train" / "000002.tar.idx").unlink()
    with open(out / "val" / "000001.tar", "r+b") as file:
        file.truncate(2000)
    for split in ("train", "val"):
        (out / split / "tokenizer" / "tokenizer.json").unlink()
    return out


def _same(one: Path, other: Path) -> bool:
    found = {path.relative_to(one) for path in one.rglob("*")}
    if found != {path.relative_to(other) for path in other.rglob("*")}:
        return False
    return all(filecmp.cmp(one / name, other / name, False) for name in found if (one / name).is_file())


def test_the_source_mends_everything_to_the_same_bytes(damaged, whole, images, capsys):
    assert main(["repair", str(damaged), "--workers", "1", "folder", "--from", str(images)]) == 0
    assert _same(damaged, whole) and main(["check", str(damaged), "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "000000.tar: mended" in told and "000002.tar: its index was made again" in told
    assert main(["repair", str(damaged), "--workers", "1", "folder", "--from", str(images)]) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_a_mirror_mends_everything_to_the_same_bytes(damaged, whole):
    assert main(["repair", str(damaged), "--workers", "1", "mirror", "--from", str(whole)]) == 0
    assert _same(damaged, whole)


@pytest.mark.parametrize("name", ["000002.tar", "000002.tar.idx"])
def test_a_folder_in_place_of_a_file_is_told_and_the_rest_is_mended(damaged, whole, capsys, name):
    folder = damaged / "train" / name
    folder.unlink(missing_ok=True)
    folder.mkdir()
    command = ["repair", str(damaged / "train"), "--workers", "1", "mirror", "--from", str(whole / "train")]
    assert main(command) == 1
    captured = capsys.readouterr()
    told = captured.out + captured.err
    assert "000000.tar: mended" in told and f"{name} is a folder where a file must be: remove that" in told
    folder.rmdir()
    assert main(command) == 0 and _same(damaged / "train", whole / "train")


@pytest.mark.parametrize(("make", "kind"), [(Path.mkdir, "folder"), (os.mkfifo, "pipe")])
def test_what_is_no_file_in_a_mirror_is_told_and_the_rest_is_mended(
    damaged, whole, tmp_path, capsys, make, kind
):
    mirror = Path(shutil.copytree(whole / "train", tmp_path / "mirror"))
    (mirror / "000000.tar").unlink()
    make(mirror / "000000.tar")
    command = ["repair", str(damaged / "train"), "--workers", "1", "mirror", "--from", str(mirror)]
    assert main(command) == 1
    captured = capsys.readouterr()
    told = captured.out + captured.err
    assert f"{mirror}: 000000.tar is a {kind} where a file must be: remove that {kind} first" in told
    assert "000001.tar: mended" in told


def test_one_split_alone_is_mended(damaged, whole, images):
    assert main(["repair", str(damaged / "train"), "--workers", "1", "folder", "--from", str(images)]) == 0
    assert _same(damaged / "train", whole / "train") and not _same(damaged / "val", whole / "val")


def test_another_source_is_refused_and_nothing_changes(damaged, images, tmp_path, capsys):
    other = Path(shutil.copytree(images, tmp_path / "mine"))
    (other / "train" / "0.jpg").write_bytes(encoded(picture(999, (48, 40))))
    before = (damaged / "train" / "000001.tar").read_bytes()
    assert main(["repair", str(damaged), "--workers", "1", "folder", "--from", str(other)]) == 1
    message = capsys.readouterr().err
    assert (
        "the source is not what mine/train was built from (inputs_sha256:" in message and "mirror" in message
    )
    assert (damaged / "train" / "000001.tar").read_bytes() == before
    assert not (damaged / "train" / "000000.tar").exists()


def test_a_mirror_with_other_bytes_is_never_believed(damaged, whole, tmp_path, capsys):
    mirror = Path(shutil.copytree(whole, tmp_path / "mirror"))
    shutil.copy(mirror / "train" / "000002.tar", mirror / "train" / "000001.tar")
    (mirror / "val" / "000001.tar").unlink()
    assert main(["repair", str(damaged), "--workers", "1", "mirror", "--from", str(mirror)]) == 1
    message = capsys.readouterr().err
    assert "train/000001.tar is still bad: what was made for it has the sha256" in message
    assert "val/000001.tar is still bad:" in message and "has no such shard either" in message
    assert filecmp.cmp(damaged / "train" / "000000.tar", whole / "train" / "000000.tar", False)
    assert not (damaged / "train" / ".build").exists()
