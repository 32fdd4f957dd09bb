"""Does pre-training go on from the weights that the command line names, and remember them?"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from pretrain.checkpoint import load_student, load_teacher
from pretrain.exits import FINISHED, MISTAKE
from pretrain.intact import sha256
from pretrain.main import main
from tests.engine.launch import environment
from tests.evaluate.sets import write_set
from tests.initial.conftest import VIT, timm_state, towers_of


def test_a_run_goes_on_from_a_file_of_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = timm_state(towers_of(VIT), "vit")
    file = tmp_path / "vit.safetensors"
    save_file(weights, file)
    run = replace(VIT, steps=1, save_every=1)
    (tmp_path / "recipe.json").write_text(run.to_json())
    data, out = write_set(tmp_path / "data", "train", 4), tmp_path / "out"
    command = [
        "--recipe",
        tmp_path / "recipe.json",
        "--data",
        f"imagenet1k={data}",
        "--out",
        out,
        "--init",
        file,
    ]
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command sets
    with patch.dict(os.environ, environment()):  # in this process, which has imported most of what it needs
        monkeypatch.setattr("deepspeed.comm.comm.cdb", None)  # as before, for whatever starts ranks after it
        assert main([*map(str, command)]) == FINISHED
    told = capfd.readouterr().out
    first, last = (out / "checkpoints" / f"step_{step:06d}" for step in (0, 1))
    for load in (load_student, load_teacher):  # both start from it, then move
        started, moved = load(first), load(last)
        assert all(torch.equal(started[f"encoder.vit.{name}"], tensor) for name, tensor in weights.items())
        assert not torch.equal(
            moved["encoder.vit.patch_embed.proj.weight"], weights["patch_embed.proj.weight"]
        )
    record = json.loads((out / "init.json").read_text())
    assert record["place"] == str(file) and record["sha256"] == sha256(file)
    assert json.loads((first / "facts.json").read_text())["sha256"]["init"] == sha256(file)
    assert f"starts from the weights of {file}" in told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--init", "nowhere.pth:teacher"], "--init nowhere.pth does not exist: name a file of weights"),
        (["--init-heads"], "--init-heads would be ignored, nothing is read: name the weights by --init PATH"),
    ],
)
def test_a_mistake_is_told_at_once(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    sources = ["labelled=tests", "captioned=jobs"]
    assert main(["--recipe", "m3i.demo", "--data", *sources, "--out", "out", *more]) == MISTAKE
    assert message in capsys.readouterr().err
