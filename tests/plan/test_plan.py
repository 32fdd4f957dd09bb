"""Does the plan answer, and does it refuse in the first second what it cannot answer?"""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from pretrain import main as entry
from pretrain.arguments import parse
from pretrain.exits import FAILED
from pretrain.plan import __main__ as command
from pretrain.plan.machines import Cluster
from pretrain.plan.plan import Plan, make_plan
from pretrain.plan.scaling import weak_scaling
from pretrain.plan.sizes import assumed_facts, sizes_of
from pretrain.plan.step_time import EFFICIENCY
from pretrain.plan.tell import CUT_A_CORE, IMAGES_A_CORE, IMAGES_A_WORKER, tell
from pretrain.preflight.ranks import Ranks
from pretrain.preflight.recipe import look_at_recipe
from pretrain.recipes import load
from tests.paths import ROOT
from tests.preflight.here import alone, three_nodes

GB = 1e9
SHORT = ["--recipe", "m3i.vit_b16", "--gpus", "8", "--gpu", "h200", "--network", "50"]


@cache
def plan_of(recipe: str, gpus: int, gpu: str = "h200", network: float = 50, batch: int = 4096) -> Plan:
    run = replace(load(recipe), batch=batch)
    return make_plan(run, assumed_facts(run), Cluster(gpu, gpus, network * GB))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--gpu", "h300"], r"--gpu h300 is unknown; choose from .*h200"),
        (["--gpus", "12"], r"--gpus 12 .* multiple of --gpus-per-node 8: set 16"),
        (["--network", "0"], r"--network 0 must be positive"),
        (["--price", "-1"], r"--price -1.0 must be positive"),
        (["--recipe", "m3i.vit"], r"recipe='m3i.vit' is unknown"),
        (["--gpus", "3", "--gpus-per-node", "3"], r"batch=4096 must be a multiple of 6"),
    ],
)
def test_a_mistake_is_told_before_torch_is_needed(
    changes: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pretrain.plan.plan", None)  # its import would fail
    assert command.main([*SHORT, *changes]) == FAILED
    told = capsys.readouterr().err
    assert re.search(message, told), told


def test_the_printed_command_starts_the_planned_run(tmp_path: Path):
    plan = plan_of("m3i.vit_b16", 8)
    plan = replace(plan, run=replace(plan.run, name="a run; $HOME"))
    overrides = ["--batch", "4096", "--name", plan.run.name]
    told = tell(plan, "m3i.vit_b16", overrides, price=2.0)
    assert "images a core as of 2 views of 224 px from JPEG files of 340 x 256 pixels" in told
    text = told.split("Command:\n")[1].replace("\\\n", " ")
    printed = shlex.split(text.replace("DIR", str(tmp_path)))
    run, paths = parse(printed[printed.index("pretrain/main.py") + 1 :])
    best = plan.best().setting
    assert (run.batch, run.name) == (4096, "a run; $HOME")
    assert run.backbone.activation_checkpoint == best.checkpoint
    assert paths.ds_config.stem == best.file


def test_the_simplest_of_the_fastest_that_fit_is_named():
    best = plan_of("m3i.vit_b16", 8).best()
    assert (best.setting.file, best.setting.checkpoint) == ("zero2", "none")


def test_what_does_not_fit_is_told_with_what_it_lacks():
    plan = plan_of("m3i.internimage_h", 1, "rtx4090", batch=1024)
    with pytest.raises(
        ValueError, match=r"fits on 1 rtx4090 in no setting: .* lacks [0-9.]+ GiB a GPU: .*GPUs"
    ):
        plan.best()


def test_a_slow_network_prefers_what_sends_less_across_nodes():
    def waits(file: str) -> float:
        plan = plan_of("m3i.internimage_h", 16, network=1)
        return next(one for one in plan.planned if one.setting.file == file).time.exposed

    assert waits("zero3") < waits("zero2")


def test_hpz_gathers_within_the_node_what_the_backward_pass_reads():
    plan = plan_of("m3i.internimage_h", 16)
    hpz = next(one for one in plan.planned if one.setting.file == "zero3_hpz")
    assert [m.within for m in hpz.messages if m.what == "weights before backward"] == [8]


def test_twice_the_gpus_halve_the_days_where_nothing_waits():
    few, many = plan_of("m3i.internimage_h", 8), plan_of("m3i.internimage_h", 16)
    assert many.days(many.best()) == pytest.approx(few.days(few.best()) / 2, rel=0.05)


def test_time_rises_with_nodes_at_equal_images():
    plan = plan_of("m3i.internimage_h", 16)
    grown = weak_scaling(plan, plan.best().setting)
    assert [one.gpus for one in grown] == [8, 64, 256, 1024]
    four = replace(plan, cluster=replace(plan.cluster, gpus_per_node=4))
    assert [one.gpus for one in weak_scaling(four, plan.best().setting)] == [4, 64, 256, 1024]
    assert grown[0].efficiency == 1 > grown[1].efficiency >= grown[3].efficiency > 0.5


def test_constants_are_those_that_were_measured():
    rates = json.loads((ROOT / "benchmarks/results/loader.json").read_text())["samples_a_second"]["340 x 256"]
    keys = {"none": "views", "colours": "views, colours on the device", "all": "views, all on the device"}
    assert pytest.approx({name: rates[key] for name, key in keys.items()}, rel=0.05) == CUT_A_CORE
    wait = json.loads((ROOT / "benchmarks/results/loader_wait.json").read_text())
    slower = min(span["images_a_second_without_pause"] for span in (wait, wait["steady"]))
    assert slower == pytest.approx(IMAGES_A_WORKER, rel=0.05)
    assert IMAGES_A_CORE["none"] == pytest.approx(IMAGES_A_WORKER) and IMAGES_A_CORE["all"] > IMAGES_A_WORKER
    recipes = json.loads((ROOT / "benchmarks/results/m3i_step_gpu.json").read_text())["recipes"]
    for measured in (recipes[name]["zero2"] for name in ("internimage_h", "vit_b16")):
        beside = sum(measured["shares_of_step"][part] for part in ("optimizer", "teacher, average"))
        assert measured["share_of_peak"] / (1 - beside) == pytest.approx(EFFICIENCY, rel=0.05)


def test_the_preflight_counts_the_same_and_tells_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "quieten", lambda: None)  # what it sets would stay for other tests
    given = {"ds_config": ROOT / "ds_configs" / "zero2.json", "micro_batches": 1, "compile": False}
    here = alone(three_nodes(tmp_path, **given))
    model = look_at_recipe(here)
    sizes = sizes_of(here.run, assumed_facts(here.run))
    assert model["parameters"] == sizes.num_trained
    assert model["checkpoint"] == 12 * sizes.num_trained + 4 * sizes.num_averaged
    assert model == here.model, "for the room that it needs on disk and in memory"
    here.ranks = Ranks(world=3)
    with pytest.raises(ValueError, match=r"batch=64 must be a multiple of 3 \(3 ranks x 1 images an input\)"):
        look_at_recipe(here)
