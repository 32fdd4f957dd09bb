"""Does one command pre-train, probe and tabulate methods, guides included, and go on where it stopped?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from pretrain.compare.__main__ import compare, main
from tests.models.guide_folders import clip_folder, vit_folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    assert data_prep(["build", "scenes", "--out", str(folder), "--count", "72", "--heldout", "0.3333"]) == 0
    return folder


def test_guides_are_compared_by_one_command(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip_folder(tmp_path / "clip")
    vit_folder(tmp_path / "dino")
    out = tmp_path / "out"
    command = [
        "guides",
        "--data",
        f"scenes={scenes / 'train'}",
        "--sets",
        f"scenes={scenes}",
        "--out",
        str(out),
    ]
    command += [
        "--guide",
        f"clip={tmp_path / 'clip'}",
        f"dino={tmp_path / 'dino'}",
        "--steps",
        "2",
        "--batch",
        "8",
    ]
    command += ["--jobs", "2", "--fine-tune", "1"]
    assert compare([*command, "--dry-run"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert len(planned) == 4 and sum("--guide" in line for line in planned) == 2
    assert not list(out.rglob("log.jsonl"))
    assert compare(command) == 0, (out / "runs" / "clip-seed0" / "output.txt").read_text()
    table = capsys.readouterr().out
    record = json.loads((out / "comparison.json").read_text())
    assert set(record["methods"]) == {"clip", "dino", "untrained"}
    titles = ["scenes kNN", "scenes linear", "scenes dense mIoU", "scenes fine-tuned", "mean of probes"]
    assert all(list(of_method) == titles for of_method in record["methods"].values())
    assert (out / "comparison.md").read_text() in table
    assert "<svg" in (out / "comparison.svg").read_text()
    log = (out / "runs" / "clip-seed0" / "log.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in log} >= {1, 2}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("evaluation-*.json")}
    assert compare(command) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2


def test_mistakes_are_told_before_anything_is_run(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {
        "--data": f"scenes={scenes / 'train'}",
        "--sets": f"scenes={scenes}",
        "--out": str(tmp_path / "out"),
    }
    for name, changes, message in (
        ("m4i", {}, "comparison 'm4i' is unknown"),
        ("guides", {}, "--guide names [], this comparison needs ['clip', 'dino']"),
        ("m3i", {"--data": "scenes"}, "--data 'scenes' must look like NAME=DIR"),
        ("m3i", {"--data": f"scenes={scenes}"}, "below it are data sets"),
        ("m3i", {"--sets": f"scenes={scenes / 'train'}"}, "must hold train/ and one of"),
        ("m3i", {"--jobs": "0"}, "--jobs 0 must be positive"),
        ("m3i", {"--steps": "0"}, "--steps 0 must be positive"),
    ):
        arguments = [name, *(part for pair in (good | changes).items() for part in pair)]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
