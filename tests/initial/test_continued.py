"""Does pre-training go on from the weights that the command line names, and remember them?"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint import load_student, load_teacher
from pretrain.exits import FINISHED, MISTAKE
from pretrain.initial.layouts import INTERNIMAGE_PARTS
from pretrain.intact import sha256
from pretrain.main import main
from pretrain.models.internimage_layouts import join, write
from pretrain.recipes import load
from pretrain.towers import Towers
from tests.engine.launch import in_float32, run_ranks
from tests.evaluate.sets import write_set
from tests.fakes import shrink
from tests.initial.conftest import SWIN, VIT, timm_state, towers_of
from tests.paths import ROOT


def plain_internimage(towers: Towers) -> dict[str, Tensor]:
    """A whole model under the published names."""
    state: dict[str, Tensor] = {}
    for prefix, part in INTERNIMAGE_PARTS.items():
        own = {
            name.removeprefix(prefix): t for name, t in towers.state_dict().items() if name.startswith(prefix)
        }
        state |= join({part: own})
    return write(state, "plain")


INTERNIMAGE_1K = shrink(replace(load("m3i.vit_b16"), backbone=load("m3i.internimage_h").backbone))
CONTINUED = {
    "vit": (VIT, partial(timm_state, family="vit")),
    "swin": (SWIN, partial(timm_state, family="swin")),
    "internimage": (INTERNIMAGE_1K, plain_internimage),
}


@pytest.mark.parametrize("family", CONTINUED)
def test_a_run_goes_on_from_a_published_backbone(family: str, tmp_path: Path) -> None:
    run, published = CONTINUED[family]
    towers = towers_of(run)
    file = tmp_path / "published.safetensors"
    save_file(published(towers), file)
    run = replace(run, steps=1, save_every=1)
    (tmp_path / "recipe.json").write_text(run.to_json())
    data, out, log = write_set(tmp_path / "data", "train", 4), tmp_path / "out", tmp_path / "log.txt"
    command = [
        "--recipe",
        tmp_path / "recipe.json",
        "--data",
        f"imagenet1k={data}",
        "--out",
        out,
        "--init",
        file,
        "--ds-config",
        in_float32("zero2", tmp_path),
    ]
    codes = run_ranks([str(ROOT / "pretrain" / "main.py"), *map(str, command)], log, world=1)
    told = log.read_text()
    assert codes == [FINISHED], told
    first, last = (out / "checkpoints" / f"step_{step:06d}" for step in (0, 1))
    for towers_at in (load_student, load_teacher):  # both start from it, then move
        started, moved = towers_at(first), towers_at(last)
        for name, weight in towers.encoder.named_parameters():
            assert torch.equal(started[f"encoder.{name}"], weight), name
        first_weight, weight = next(iter(towers.encoder.named_parameters()))
        assert not torch.equal(moved[f"encoder.{first_weight}"], weight)
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
