"""Whatever befalls a run, does it end as it should, and go on as if nothing had been?"""

from __future__ import annotations

import json
import math
import signal
from typing import Any

import pytest

from pretrain.exits import DIVERGED, FAILED, FINISHED, LOST, PREEMPTED
from tests.data.sets import good_set
from tests.engine.launch import start
from tests.paths import ROOT

SECONDS = 900  # of a busy machine; a quiet one needs 100
KILLS = 20
BY_ZERO3 = "killed_1"
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of drill.py, in one process that forks the ranks."""
    folder = tmp_path_factory.mktemp("drill")
    good_set(folder / "data" / "imagenet1k", sizes=(14, 10, 18), has_text=False)
    codes, output = start(folder, world=1, script=ROOT / "tests" / "engine" / "drill.py", timeout=SECONDS)
    assert codes == [0], output
    return json.loads((folder / "result.json").read_text())


def _codes(found: dict[str, Any]) -> list[list[int]]:
    return [end["codes"] for end in found["ends"]]


def _is_like(found: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same numbers at every step, and the same teacher at the end."""
    return found["curve"] == other["curve"] and found["teacher"] == other["teacher"]


def test_kills_at_random_moments_change_nothing_and_cost_nothing_on_disk(drill: dict[str, Any]) -> None:
    found = drill["killed"]
    assert found["kills"] == KILLS and not found["problems"]
    assert found["during_a_save"] > 0, "another seed: no kill came during a save"
    assert found["before_a_batch"] == KILLS // 4
    by_zero3, straight = found["outcomes"].pop(BY_ZERO3), drill["undisturbed"]["straight"]
    for outcome in found["outcomes"].values():
        assert _is_like(outcome, straight)
    for step, expected in zip(
        by_zero3["curve"], straight["curve"], strict=True
    ):  # float32 sums in another order
        assert step["nats"] == pytest.approx(expected["nats"], rel=1e-3), step["step"]


def test_a_signal_to_any_rank_saves_and_ends_all_with_the_code_to_start_again(drill: dict[str, Any]) -> None:
    found = drill["asked_to_stop"]
    assert _codes(found) == [[PREEMPTED] * 2, [PREEMPTED] * 2, [FINISHED] * 2]
    for end, step in zip(found["ends"], (5, 8), strict=False):
        assert end["output"].count(f"stopped: asked to stop by a signal, after step {step} of 9") == 1
        assert "worker" not in end["output"], "its workers, who got the signal too, were there until the save"
    assert _is_like(found, drill["undisturbed"]["straight"])


def test_a_checkpoint_that_is_there_is_not_written_again_by_a_run_that_is_asked_to_stop(
    drill: dict[str, Any],
) -> None:
    found = drill["asked_before_a_step"]
    assert _codes(found) == [[PREEMPTED] * 2]
    assert "REFUSED batch 6 after step 6" in found["ends"][0]["output"]
    assert found["is_untouched"]


def test_a_rank_that_dies_is_named_with_its_last_step(drill: dict[str, Any]) -> None:
    found = drill["one_killed"]
    assert _codes(found) == [[LOST, KILLED], [FINISHED] * 2]
    told = found["ends"][0]["output"]
    assert "rank 1 (host " in told and "after step 4, while it waits for a batch: gone without a word" in told
    assert "Traceback" not in told
    assert _is_like(found, drill["undisturbed"]["straight"])


def test_a_rank_that_hangs_is_named_and_stacks_are_kept(drill: dict[str, Any]) -> None:
    found = drill["one_hung"]
    stopped, asleep, _ = found["ends"]
    assert _codes(found) == [[LOST, KILLED], [LOST, LOST], [FINISHED] * 2]
    assert "rank 1 (host " in stopped["output"] and "gone without a word or stopped" in stopped["output"]
    assert "waits for a batch: the others wait for it" in asleep["output"]
    assert asleep["output"].count("no progress in 8 s") == 1
    assert set(found["stacks"][0]) == {"rank_00000"} and "in step" in found["stacks"][0]["rank_00000"]
    assert "in changed" in found["stacks"][1]["rank_00001"], "where the rank slept"
    assert _is_like(found, drill["undisturbed"]["straight"])


def test_a_rank_or_gpu_lost_before_the_watchdog_or_without_signs_starts_again(drill: dict[str, Any]) -> None:
    found = drill["lost_early"]
    killed, stopped, device, unseen, _ = (end["output"] for end in found["ends"])
    assert _codes(found) == [[LOST, KILLED], [LOST, KILLED], [LOST] * 2, [LOST] * 2, [FINISHED] * 2]
    assert "a rank died at the start (" in killed and "Traceback" not in killed
    assert "rank 0 (host " in stopped and "has waited 6 s for others at the start" in stopped
    assert "rank 1 (host " in device and "its device failed (CUDA error: uncorrectable ECC" in device
    assert "no progress in 5 s" in unseen and "Traceback" not in device + unseen
    assert _is_like(found, drill["undisturbed"]["straight"])


def test_a_poisoned_batch_of_one_rank_might_never_have_been(drill: dict[str, Any]) -> None:
    found = drill["poisoned"]
    assert _codes(found)[1] == [FINISHED] * 2
    told = found["ends"][0]["output"]
    assert told.count("REFUSED batch 4 after step 4: gradient norm is inf; image_same is nan") == 1
    assert found["bundles"] == ["step_000004-batch_000004"]
    assert [sample["position"] for sample in found["samples"]] == [18, 19]
    assert all(sample["key"] and sample["shard"].endswith(".tar") for sample in found["samples"])
    assert _is_like(found, drill["undisturbed"]["without_4"])
    assert not _is_like(found, drill["undisturbed"]["straight"])


def test_a_bundle_runs_the_step_again_with_equal_numbers(drill: dict[str, Any]) -> None:
    again, other = drill["poisoned"]["again"], drill["poisoned"]["again_mended"]
    assert again["codes"] == [FINISHED] * 2, again["output"]
    assert "batch 4 after step 4" in again["output"] and "differs" not in again["output"]
    assert "step_000003: 1 steps are made again before that of the bundle" in again["output"]
    assert other["codes"] == [FAILED] * 2 and "differs" in other["output"]
    assert other["output"].count("its samples are read from the data again") == 1
    norm = next(line for line in other["output"].splitlines() if "gradient norm" in line)
    assert math.isfinite(float(norm.split()[-2])), norm


def test_refused_steps_in_a_row_go_back_and_leave_out_what_led_there(drill: dict[str, Any]) -> None:
    found = drill["poisoned_twice"]
    assert _codes(found) == [[FINISHED] * 2]
    told = found["ends"][0]["output"]
    assert told.count("BACK from step 4 to ") == 1 and "batches [3, 4, 5] are left out from now on" in told
    assert _is_like(found, drill["undisturbed"]["without_345"])


def test_a_checkpoint_that_was_saved_while_the_run_diverged_is_given_up_for_the_older_one(
    drill: dict[str, Any],
) -> None:
    found = drill["poisoned_state"]
    assert _codes(found) == [[FINISHED] * 2]
    again, older = [line for line in found["ends"][0]["output"].splitlines() if line.startswith("BACK from")]
    assert "checkpoints/step_000006, after 2 refused" in again
    assert "checkpoints/step_000003, after 2 refused" in older
    assert "those of steps [6] led there again and are given up: batches [4, 5, 8, 9] are left out" in older
    assert _is_like(found, drill["undisturbed"]["without_4_to_9"])


def test_refused_steps_without_end_end_the_run_with_the_evidence(drill: dict[str, Any]) -> None:
    found = drill["poisoned_for_ever"]
    assert _codes(found) == [[DIVERGED] * 2]
    told = found["ends"][0]["output"]
    assert told.count("error: 2 steps in a row were refused after step") == 1
    assert "gone back 1 times to" in told and "--replay " in told and "lower optim.lr" in told
    assert [line["step"] for line in found["curve"]] == [1, 2, 3]


def test_a_full_disk_is_told_and_the_run_goes_on(drill: dict[str, Any]) -> None:
    found = drill["full_disk"]
    assert _codes(found) == [[FINISHED] * 2]
    assert found["ends"][0]["output"].count("NOT SAVED") == 1
    assert found["steps"] == [0, 3, 9]
    assert _is_like(found, drill["undisturbed"]["straight"])


def test_a_small_disk_that_others_fill_is_told_and_the_run_goes_on(drill: dict[str, Any]) -> None:
    found = drill["full_tmpfs"]
    if "not_mounted" in found:
        pytest.skip(f"no small disk can be mounted here: {found['not_mounted']}")
    assert _codes(found) == [[FINISHED] * 2]
    told = found["ends"][0]["output"]
    assert told.count("NOT SAVED") == 1 and "MiB are free, it needs" in told
    assert found["steps"] == [0, 3, 9]
    assert _is_like(found, drill["undisturbed"]["straight"])


def test_a_full_disk_of_the_log_is_told_once_a_file_and_nothing_of_it_is_lost(drill: dict[str, Any]) -> None:
    found = drill["full_out"]
    if "not_mounted" in found:
        pytest.skip(f"no small disk can be mounted here: {found['not_mounted']}")
    assert _codes(found) == [[FINISHED] * 2]
    told = found["ends"][0]["output"]
    assert told.count("BACK from step 4 to ") == 1
    assert told.count("NO IMAGES of it are kept, only the samples' names: they take ") == 2
    for name in ("log.jsonl", "guard.jsonl"):
        assert told.count(f"{name} ([Errno 28] No space left on device): training goes on") == 1
        assert told.count(f"{name} is written again, with the ") == 1
    assert found["events"] == ["refused", "refused", "rewound"]
    assert _is_like(found, drill["undisturbed"]["without_345"])


def test_a_run_whose_place_another_process_took_over_ends_on_all_ranks_at_once(drill: dict[str, Any]) -> None:
    end = drill["s3_refuses"]["lost"]
    assert end["codes"] == [FAILED] * 2
    assert end["output"].count("step_000006 was not written: ") == 1 and "taken over" in end["output"]


def test_a_store_that_is_away_when_a_run_should_go_back_is_asked_again(drill: dict[str, Any]) -> None:
    told = drill["s3_refuses"]["lost"]["output"]
    assert told.count("NOT GONE BACK after 2 refused steps in a row, as no checkpoint can be read: ") == 1
    assert told.count("BACK from step 4 to s3://bucket/lost/step_000003, after 3 refused steps in a row") == 1


def test_a_store_that_refuses_is_told_and_the_run_goes_on(drill: dict[str, Any]) -> None:
    found = drill["s3_refuses"]
    assert _codes(found) == [[FINISHED] * 2] * 2
    refused, again = (end["output"] for end in found["ends"])
    assert refused.count("NOT SAVED") == 1 and "step_000006 could not be written" in refused
    assert found["steps"] == [0, 3, 9]
    assert "from s3://bucket/checkpoints/step_000003" in again
    assert found["elsewhere"]["codes"] == [FAILED] * 2
    told = found["elsewhere"]["output"]
    assert told.count("keeps its checkpoints in s3://bucket/checkpoints, up to step 9") == 1
    assert _is_like(found, drill["undisturbed"]["straight"])


def test_data_that_are_away_from_a_rank_end_all_at_once_with_the_code_to_start_again(
    drill: dict[str, Any],
) -> None:
    found = drill["data_away"]
    assert _codes(found) == [[PREEMPTED] * 2, [FINISHED] * 2]
    assert found["ends"][0]["output"].count("error: http://127.0.0.1:9/set cannot be read, nobody takes") == 1
    assert _is_like(found, drill["undisturbed"]["straight"])


def test_a_truncated_checkpoint_is_passed_over(drill: dict[str, Any]) -> None:
    found = drill["truncated"]
    assert _codes(found) == [[FINISHED] * 2]
    told = found["ends"][0]["output"]
    assert "step_000009 is skipped, since" in told and "checkpoints/step_000006" in told
    assert _is_like(found, drill["undisturbed"]["straight"])
