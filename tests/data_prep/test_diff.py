"""Does a comparison of two data sets tell all that differs, with the exit codes of diff(1)?"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.__main__ import main
from tests.data_prep.pictures import Item, built, encoded, picture

ITEMS = [Item(f"p-{number}", encoded(picture(number, (48, 40))), "a caption") for number in range(9)]


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("first") / "set", ITEMS)


def _diff(first: Path, second: Path, tmp_path: Path, *more: str) -> tuple[int, dict]:
    code = main(
        ["diff", str(first), str(second), "--workers", "1", "--json", str(tmp_path / "d.json"), *more]
    )
    return code, json.loads((tmp_path / "d.json").read_text())


def test_a_copy_is_the_same(first, tmp_path):
    code, found = _diff(first, Path(shutil.copytree(first, tmp_path / "set")), tmp_path, "--samples")
    assert code == 0 and found["is_same"] and found["same"] == 3 and found["samples"]["num_same"] == 9


def test_changed_added_and_removed_samples_are_told_by_key(first, tmp_path, capsys):
    items = [
        *ITEMS[:3],  # the first shard stays
        replace(ITEMS[3], caption="another caption"),
        replace(ITEMS[4], image=encoded(picture(77, (48, 40)))),
        *ITEMS[6:],  # 5 is gone, others move to other shards
        Item("new", ITEMS[0].image, "a caption"),
    ]
    second = built(tmp_path / "set", items, settings={"source": "pictures", "version": 2})
    code, found = _diff(first, second, tmp_path, "--samples")
    assert code == 1 and not found["is_same"]
    assert found["fields"] == {"builder.version": [None, 2]}
    assert (found["same"], found["changed"], found["added"], found["removed"]) == (
        1,
        ["000001.tar", "000002.tar"],
        [],
        [],
    )
    samples = found["samples"]
    assert samples["relabelled"] == ["p-3"] and samples["changed"] == ["p-4"]
    assert samples["added"] == ["new"] and samples["removed"] == ["p-5"] and samples["num_same"] == 6
    assert "builder.version: null -> 2" in capsys.readouterr().out


def test_shards_of_other_names_or_numbers_are_told(first, tmp_path, capsys):
    second = built(tmp_path / "set", ITEMS[3:])
    code, found = _diff(first, second, tmp_path)
    assert code == 1 and found["samples"] is None
    assert found["moved"] == [["000001.tar", "000000.tar"], ["000002.tar", "000001.tar"]]
    assert found["removed"] == ["000000.tar"] and found["fields"]["num_samples"] == [9, 6]
    assert "1 removed, 2 renamed" in capsys.readouterr().out


def test_trouble_is_code_2(first, tmp_path, capsys):
    assert main(["diff", str(first), str(tmp_path / "missing")]) == 2
    assert "is no folder: name" in capsys.readouterr().err
    second = Path(shutil.copytree(first, tmp_path / "set"))
    manifest = json.loads((second / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = "0" * 64
    (second / "manifest.json").write_text(json.dumps(manifest))
    content = bytearray((second / "000001.tar").read_bytes())
    content[100] ^= 1
    (second / "000001.tar").write_bytes(content)
    assert main(["diff", str(first), str(second), "--samples", "--workers", "1"]) == 2
    assert (
        "000001.tar: member p-3.jpg (byte 0, after the start): its tar header is broken"
        in capsys.readouterr().err
    )
