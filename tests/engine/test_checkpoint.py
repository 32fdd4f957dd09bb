"""Is what bears the name of a checkpoint whole, and is nothing else used?"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint, intact, resume
from pretrain.facts import DataFacts
from tests.engine.toy import FACTS, toy_run
from tests.paths import ROOT


def whole(place: Path, step: int, **state: Any) -> Path:
    """A complete folder with the files that resuming compares; `state` is more of its state.json."""
    folder = checkpoint.folder_in(place, step)
    partial = folder.with_name("partial")
    (partial / "teacher").mkdir(parents=True)
    (partial / "run.json").write_text(toy_run().to_json())
    (partial / "facts.json").write_text(FACTS.to_json())
    (partial / "teacher" / "weights").write_bytes(bytes(100))
    (partial / "state.json").write_text(json.dumps({"step": step, "optimizer_steps": step} | state))
    intact.publish(partial, folder, intact.digest(partial, intact.files_in(partial)))
    return folder


def test_checkpoints_are_listed_without_torch(tmp_path: Path) -> None:
    whole(tmp_path, 7)
    code = "import sys; from pretrain.checkpoint.__main__ import main; code = main(['ls', sys.argv[1]]); "
    command = [sys.executable, "-c", code + "sys.exit(code + ('torch' in sys.modules))", str(tmp_path)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.splitlines()[-1].split()[0] == "7"


def test_latest_is_the_newest_by_number(tmp_path: Path) -> None:
    for step in (0, 900_000, 1_000_000):
        whole(tmp_path, step)
    assert checkpoint.latest(tmp_path) == checkpoint.folder_in(tmp_path, 1_000_000)
    assert checkpoint.latest(tmp_path / "elsewhere") is None


def test_a_truncated_newest_checkpoint_is_skipped_with_a_warning(tmp_path: Path) -> None:
    older, newer = whole(tmp_path, 3), whole(tmp_path, 6)
    (newer / "teacher" / "weights").write_bytes(bytes(60))
    with pytest.warns(UserWarning, match=r"step_000006 is skipped, since .* 60 bytes instead of 100: delete"):
        assert checkpoint.latest(tmp_path) == older


def test_a_flipped_byte_is_found_by_hashes(tmp_path: Path) -> None:
    older, newer = whole(tmp_path, 3), whole(tmp_path, 6)
    (newer / "teacher" / "weights").write_bytes(bytes(99) + b"\1")
    assert checkpoint.latest(tmp_path) == newer
    with pytest.warns(UserWarning, match="teacher/weights has changed"):
        assert checkpoint.latest(tmp_path, hashes=True) == older
    with pytest.raises(ValueError, match="teacher/weights has changed since it was written: take another"):
        checkpoint.load_teacher(newer)


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(tmp_path: Path) -> None:
    (whole(tmp_path, 3) / intact.COMPLETE).unlink()
    with (
        pytest.warns(UserWarning, match="COMPLETE is missing"),
        pytest.raises(
            ValueError, match=r"none of the checkpoints of steps \[3\] in .* is whole: copy them again"
        ),
    ):
        resume.newest_or_none(tmp_path)
    assert resume.newest_or_none(tmp_path / "new") is None


def test_a_run_whose_checkpoints_lie_elsewhere_does_not_begin_anew(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    own = checkpoint.checkpoints_of(out)
    whole(elsewhere, 3)
    out.mkdir()
    record = out / checkpoint.PLACE_RECORD
    record.write_text(checkpoint.record_place(out, elsewhere))
    with pytest.raises(ValueError, match=rf"up to step 3 .* are none: .*--checkpoints {elsewhere} to go on"):
        resume.require_same_place(out, own)
    whole(own, 0)
    with pytest.raises(ValueError, match=r"where there are those up to step 0: name that place"):
        resume.require_same_place(out, own)
    with pytest.raises(ValueError, match=rf"were moved to .* delete {record}$"):
        resume.require_same_place(out, own)
    resume.require_same_place(out, elsewhere)
    whole(own, 3)  # they were copied
    resume.require_same_place(out, own)
    record.write_text("")
    with pytest.raises(ValueError, match=r"is damaged .* write there where the run keeps them"):
        resume.require_same_place(out, own)
    record.unlink()
    resume.require_same_place(out, own)


@pytest.mark.parametrize("damage", ["unlink", "empty"])
def test_without_its_mark_nothing_is_used(tmp_path: Path, damage: str) -> None:
    mark = whole(tmp_path, 3) / intact.COMPLETE
    mark.unlink() if damage == "unlink" else mark.write_text("")
    with pytest.warns(UserWarning, match="COMPLETE is"):
        assert checkpoint.latest(tmp_path) is None


def test_the_same_run_may_go_on_with_other_intervals(tmp_path: Path) -> None:
    backbone = dataclasses.replace(toy_run().backbone, activation_checkpoint="full")
    run = dataclasses.replace(toy_run(), backbone=backbone, save_every=1, log_every=7, max_bad=0.5)
    resume.check_resumable(whole(tmp_path, 3), run, FACTS)


def test_a_run_that_is_older_than_a_field_goes_on_with_its_default(tmp_path: Path) -> None:
    folder = whole(tmp_path, 3)
    saved = json.loads((folder / "run.json").read_text())
    del saved["pool"]["kind"]
    (folder / "run.json").write_text(json.dumps(saved))
    resume.check_resumable(folder, toy_run(), FACTS)
    pool = dataclasses.replace(toy_run().pool, kind="mean")
    with pytest.raises(ValueError, match=r"run.pool.kind was 'attention', is 'mean'"):
        resume.check_resumable(folder, dataclasses.replace(toy_run(), pool=pool), FACTS)


def test_another_recipe_is_refused_by_field(tmp_path: Path) -> None:
    run = toy_run()
    run = dataclasses.replace(run, steps=20, optim=dataclasses.replace(run.optim, lr=0.5))
    message = r"run.optim.lr was 0.01, is 0.5; run.steps was 10, is 20. Go on with the same, or .* --out"
    with pytest.raises(ValueError, match=message):
        resume.check_resumable(whole(tmp_path, 3), run, FACTS)


def test_other_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"facts.vocab_size was 0, is 9"):
        resume.check_resumable(whole(tmp_path, 3), toy_run(), DataFacts(FACTS.categories, 9))
    rebuilt = dataclasses.replace(FACTS, sha256={"toy": "9f"})
    message = r"what is read as 'toy' has changed \(other SHA-256\). Go on with the same, or"
    with pytest.raises(ValueError, match=message):
        resume.check_resumable(checkpoint.latest(tmp_path), toy_run(), rebuilt)


def test_a_checkpoint_that_tells_no_numbers_of_samples_is_gone_on_from(tmp_path: Path) -> None:
    counted = dataclasses.replace(FACTS, num_samples={"toy": 12})
    resume.check_resumable(whole(tmp_path, 3), toy_run(), counted)


def test_files_of_deepspeed_are_refused(tmp_path: Path) -> None:
    folder = whole(tmp_path, 3)
    (folder / "state.json").write_text('{"step": 3, "world": 2}')
    with pytest.raises(ValueError, match=r"holds DeepSpeed's own files, .* start anew with another --out"):
        resume.check_resumable(folder, toy_run(), FACTS)
