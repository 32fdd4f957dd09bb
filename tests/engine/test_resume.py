"""Does a run that was interrupted go on as if it had not been, on as many ranks and at the stage that there are?"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pretrain import checkpoint
from tests.engine.conftest import TOLERANCE
from tests.engine.launch import launch, start
from tests.engine.ranks import ALONE, BY_FOUR


@pytest.fixture(scope="module")
def alone(ranks: dict[str, Any], ranks_folder: Path) -> dict[str, Any]:
    """What one rank found that went on from two, before it was killed."""
    codes, output = start(ranks_folder, "go_on_alone", "go_on_in_bfloat16", "die_while_saving", world=1)
    assert codes == [-signal.SIGKILL], output
    return json.loads((ranks_folder / "result.json").read_text())


@pytest.fixture(scope="module")
def by_four(alone: dict[str, Any], ranks_folder: Path) -> dict[str, Any]:
    """What four ranks found that went on from one."""
    return launch(ranks_folder, "go_on_by_four", world=4)["go_on_by_four"]


def values_of(folder: str) -> dict[str, torch.Tensor]:
    """Every value of a checkpoint by kind and name, put together from the slices of all ranks."""
    whole = {}
    for kind in ("student", "optimizer", "teacher"):
        whose = "teacher" if kind == "teacher" else "student"
        shapes = json.loads((Path(folder) / whose / "layout.json").read_text())["parameters"]
        for path in (Path(folder) / kind).glob("rank_*.safetensors"):
            with safe_open(path, framework="pt") as file:
                starts = json.loads(file.metadata()["starts"])
                for name in file.keys():  # noqa: SIM118 (the file is no dict)
                    parameter = name.split("/")[-1]
                    numel = torch.Size(shapes[parameter]["shape"]).numel()
                    values = whole.setdefault(f"{kind}/{name}", torch.full((numel,), torch.nan))
                    part = file.get_tensor(name)
                    place = values[starts[name] : starts[name] + len(part)]
                    assert place.isnan().all(), f"{kind}/{name} is written twice"
                    place.copy_(part)
        if kind != "optimizer":
            buffers = load_file(Path(folder) / kind / "buffers.safetensors")
            whole |= {f"{kind} {name}": values.float() for name, values in buffers.items()}
    return whole


def test_resume_equals_uninterrupted(ranks: dict[str, Any]) -> None:
    for variant, curves in ranks["stop_and_resume"].items():
        assert curves["resumed"] == curves["straight"], variant


@pytest.mark.parametrize("launched", ["alone", "in_bfloat16", "by_four"])
def test_another_number_of_ranks_stage_and_precision_takes_over_every_bit(
    alone: dict[str, Any], by_four: dict[str, Any], launched: str
) -> None:
    found = by_four if launched == "by_four" else alone[f"go_on_{launched}"]
    for variant, of_variant in found.items():
        before, again = values_of(of_variant["before"]), values_of(of_variant["again"])
        assert before.keys() == again.keys() and len(before) > 40, variant
        for name, values in before.items():
            assert torch.equal(values, again[name]), f"{variant}: {name}"


@pytest.mark.parametrize("first", ALONE)
def test_two_then_one_then_four_ranks_equal_uninterrupted(
    ranks: dict[str, Any], alone: dict[str, Any], by_four: dict[str, Any], first: str
) -> None:
    straight = ranks["compare_stages"][first]["curve"]
    second = ALONE[first]
    assert alone["go_on_alone"][second]["curve"] == [pytest.approx(straight[3], rel=TOLERANCE)]
    assert by_four[BY_FOUR[second]]["curve"] == [pytest.approx(straight[4], rel=TOLERANCE)]


@pytest.mark.parametrize("first", ALONE)
def test_a_run_goes_on_in_bfloat16(ranks: dict[str, Any], alone: dict[str, Any], first: str) -> None:
    expected = ranks["compare_stages"][first]["curve"][3]["dense"]
    (found,) = alone["go_on_in_bfloat16"][ALONE[first]]["curve"]
    assert found["dense"] == pytest.approx(expected, rel=0.02)  # its own rounding of weights and activations
    assert found["dense"] != expected


def test_a_rank_that_cannot_copy_its_part_is_named_on_all_at_once(ranks: dict[str, Any]) -> None:
    found = ranks["copy_fails"]
    assert found["before"] == [] and found["after"] == [0]
    for told in found["told"]:
        assert "step_000000 could not be written (rank 1: no memory is left on the device)" in told


def test_a_kill_while_saving_leaves_the_older_checkpoint(alone: dict[str, Any], ranks_folder: Path) -> None:
    out = ranks_folder / "die_while_saving"
    assert checkpoint.latest(out, hashes=True) == checkpoint.folder_in(out, 1)
    (left_over,) = out.glob(".tmp-step_000002-*")
    assert list(left_over.rglob("*.safetensors"))
    checkpoint.stores.store_at(out).tidy()
    assert [path.name for path in out.iterdir()] == ["step_000001"]
