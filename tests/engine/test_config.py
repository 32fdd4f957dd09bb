"""Is a ds config that decides more or less than memory and communication refused?"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from pretrain.distributed import start_distributed
from pretrain.ds_config import (
    RECIPE_OWNS,
    check_config,
    is_fast_in_bfloat16,
    read_ds_config,
    resolve_config,
    teacher_config,
)
from pretrain.exits import RankLost
from tests.engine.toy import toy_run
from tests.paths import ROOT

GOOD: dict[str, Any] = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}
FILES = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("key", RECIPE_OWNS)
def test_a_number_of_the_recipe_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=3 .* decided by the recipe: delete it"):
        check_config(GOOD | {key: 3}, toy_run(), 1)


def test_a_key_that_nothing_uses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'zero_optimisation' .* not used; choose from .*zero_optimization"):
        check_config(GOOD | {"zero_optimisation": {}}, toy_run(), 1)


@pytest.mark.parametrize(
    ("text", "rule"),
    [('{"bf16": }', "must be JSON: .* column"), ('{"a":' * 10**5, "must be JSON"), ("[]", "a JSON object")],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "zero9.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"zero9\.json .*{rule}"):
        read_ds_config(path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zero_optimization": 3}, r"zero_optimization=3 .* must be an object"),
        (GOOD | {"bf16": True}, r"bf16=True .* must be an object"),
        (GOOD | {"bf16": {"enable": True}}, r"bf16.enable .* is not used; choose from \['enabled'\]"),
    ],
)
def test_a_section_of_another_shape_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(section, toy_run(), 1)


def test_a_key_that_zero_does_not_know_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(
        ValueError, match=r"zero_optimization.overlap_com=True .* did you mean 'overlap_comm'\?"
    ):
        check_config({"zero_optimization": {"stage": 2, "overlap_com": True}}, toy_run(), 1)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            "data_types.grad_accum_dtype='fp32' .* take zero_optimization.stage=2",
        ),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "round_robin_gradients=true .* leave it out",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            r"offload_optimizer.ratio=0\.5 .* must be 1\.0",
        ),
        (GOOD | {"prescale_gradients": True}, "'prescale_gradients' .* is not used"),
    ],
)
def test_what_deepspeed_would_fail_with_later_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(section, toy_run(), 1)


def test_a_port_that_is_taken_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=rf"cannot meet at 127.0.0.1:{port} .* --master_port"):
            start_distributed()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_do_not_come_are_lost(
    rank: str, monkeypatch: pytest.MonkeyPatch, free_port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": str(free_port)}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLost, match=rf"not all 2 ranks came to 127.0.0.1:{free_port} in 1 s"):
        start_distributed(1.0)


@pytest.mark.parametrize("is_followed", [False, True])
def test_deepspeed_marks_its_functions_for_nsight_systems_alone(
    is_followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(deepspeed.utils.nvtx, "enable_nvtx", not is_followed)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("NSYS_PROFILING_SESSION_ID", raising=False)
    if is_followed:
        monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    start_distributed()
    assert deepspeed.utils.nvtx.enable_nvtx is is_followed


@pytest.mark.parametrize("stage", [None, 0, 4])
def test_other_stages_are_refused(stage: int | None) -> None:
    with pytest.raises(ValueError, match=f"stage={stage} .* must be 1, 2 or 3"):
        check_config({"zero_optimization": {"stage": stage}}, toy_run(), 1)


def test_a_precision_that_is_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bf16.enabled='yes' .* must be true, false or"):
        check_config(GOOD | {"bf16": {"enabled": "yes"}}, toy_run(), 1)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(ValueError, match=r"batch=8 must be a multiple of 6 .* set --batch 12"):
        check_config(GOOD, toy_run(), 3)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_resolves_to_what_deepspeed_needs(file: Any) -> None:
    config, line = resolve_config(json.loads(file.read_text()), toy_run(), torch.device("cpu"))
    assert config["gradient_clipping"] == 1.0
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["bf16"]["enabled"] is is_fast_in_bfloat16(torch.device("cpu"))[0]
    assert f"ZeRO-{config['zero_optimization']['stage']}" in line


def test_clipping_of_zero_is_said_because_deepspeed_clips_at_one() -> None:
    run = toy_run()
    run = type(run)(**{**vars(run), "optim": type(run.optim)(warmup=2, clip=0.0)})
    assert resolve_config(GOOD, run, torch.device("cpu"))[0]["gradient_clipping"] == 0.0


def test_no_weight_of_the_teacher_stays_resident() -> None:
    config, _ = resolve_config(json.loads(FILES[-1].read_text()), toy_run(), torch.device("cpu"))
    zero = teacher_config(config)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 0
    assert zero["stage3_max_reuse_distance"] == 0
    assert "offload_optimizer" not in zero
