"""Is what bears the name of a checkpoint whole, and is nothing else used?"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain import checkpoint, intact, resume
from pretrain.facts import DataFacts
from tests.engine.launch import start
from tests.engine.toy import FACTS, toy_run
from tests.paths import ROOT

Disk = namedtuple("Disk", "total used free")


def _whole(out: Path, step: int, **state: Any) -> Path:
    """A complete folder with the files that resuming compares."""
    folder = checkpoint.checkpoint_folder(out, step)
    partial = folder.with_name("partial")
    (partial / "teacher").mkdir(parents=True)
    (partial / "run.json").write_text(toy_run().to_json())
    (partial / "facts.json").write_text(FACTS.to_json())
    (partial / "teacher" / "weights").write_bytes(bytes(100))
    values = {"step": step, "world": 2, "stage": 3, "dtype": "torch.float32"} | state
    (partial / "state.json").write_text(str(values).replace("'", '"'))
    intact.publish(partial, folder, intact.digest(partial, intact.files_in(partial)))
    return folder


def test_latest_is_the_newest_by_number(tmp_path: Path) -> None:
    for step in (0, 900_000, 1_000_000):
        _whole(tmp_path, step)
    assert checkpoint.latest(tmp_path) == checkpoint.checkpoint_folder(tmp_path, 1_000_000)
    assert checkpoint.latest(tmp_path / "elsewhere") is None


def test_a_truncated_newest_checkpoint_is_skipped_with_a_warning(tmp_path: Path) -> None:
    older, newer = _whole(tmp_path, 3), _whole(tmp_path, 6)
    (newer / "teacher" / "weights").write_bytes(bytes(60))
    with pytest.warns(UserWarning, match=r"step_000006 is skipped, since .* 60 bytes instead of 100: delete"):
        assert checkpoint.latest(tmp_path) == older


def test_a_flipped_byte_is_found_by_hashes(tmp_path: Path) -> None:
    older, newer = _whole(tmp_path, 3), _whole(tmp_path, 6)
    (newer / "teacher" / "weights").write_bytes(bytes(99) + b"\1")
    assert checkpoint.latest(tmp_path) == newer
    with pytest.warns(UserWarning, match="teacher/weights has changed"):
        assert checkpoint.latest(tmp_path, hashes=True) == older
    with pytest.raises(ValueError, match="teacher/weights has changed since it was written: take another"):
        checkpoint.load_teacher(newer)


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(tmp_path: Path) -> None:
    (_whole(tmp_path, 3) / intact.COMPLETE).unlink()
    with (
        pytest.warns(UserWarning, match="COMPLETE is missing"),
        pytest.raises(
            ValueError, match=r"none of the checkpoints of steps \[3\] in .* is whole: copy them again"
        ),
    ):
        resume.newest_or_none(tmp_path)
    assert resume.newest_or_none(tmp_path / "new") is None


@pytest.mark.parametrize("damage", ["unlink", "empty"])
def test_without_its_mark_nothing_is_used(tmp_path: Path, damage: str) -> None:
    mark = _whole(tmp_path, 3) / intact.COMPLETE
    mark.unlink() if damage == "unlink" else mark.write_text("")
    with pytest.warns(UserWarning, match="COMPLETE is"):
        assert checkpoint.latest(tmp_path) is None


def test_the_first_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (0, 2, 4, 6):
        _whole(tmp_path, step)
    checkpoint._prune(tmp_path)
    left = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_000000", "step_000004", "step_000006"]


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = _whole(tmp_path, 3)
    engine = SimpleNamespace(
        run=toy_run(), stage=3, dtype=torch.float32, device=torch.device("cpu"), steps_done=6, average=None,
        balance=None, checkpoint_bytes=2**30, save_native=print, load_native=print,
    )  # fmt: skip
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: Disk(0, 0, 2**20))
    with pytest.raises(OSError, match=r"1 MiB are free .* needs 1040 MiB; earlier .* untouched: free space"):
        checkpoint.save(engine, tmp_path, FACTS, None)
    assert [folder for folder in (tmp_path / "checkpoints").iterdir()] == [kept]
    assert checkpoint.latest(tmp_path, hashes=True) == kept


SAME = {"world": 2, "stage": 3, "dtype": torch.float32}


def test_the_same_run_may_go_on_with_other_intervals(tmp_path: Path) -> None:
    backbone = dataclasses.replace(toy_run().backbone, activation_checkpoint="full")
    run = dataclasses.replace(toy_run(), backbone=backbone, save_every=1, log_every=7, max_bad=0.5)
    resume.check_resumable(_whole(tmp_path, 3), run, FACTS, **SAME)


def test_a_run_that_is_older_than_a_field_goes_on_with_its_default(tmp_path: Path) -> None:
    folder = _whole(tmp_path, 3)
    saved = json.loads((folder / "run.json").read_text())
    del saved["pool"]["kind"]
    (folder / "run.json").write_text(json.dumps(saved))
    resume.check_resumable(folder, toy_run(), FACTS, **SAME)
    pool = dataclasses.replace(toy_run().pool, kind="mean")
    with pytest.raises(ValueError, match=r"run.pool.kind was 'attention', is 'mean'"):
        resume.check_resumable(folder, dataclasses.replace(toy_run(), pool=pool), FACTS, **SAME)


def test_another_recipe_is_refused_by_field(tmp_path: Path) -> None:
    run = toy_run()
    run = dataclasses.replace(run, steps=20, optim=dataclasses.replace(run.optim, lr=0.5))
    message = r"run.optim.lr was 0.01, is 0.5; run.steps was 10, is 20. Go on with the same, or .* --out"
    with pytest.raises(ValueError, match=message):
        resume.check_resumable(_whole(tmp_path, 3), run, FACTS, **SAME)


def test_other_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"facts.vocab_size was 0, is 9"):
        resume.check_resumable(_whole(tmp_path, 3), toy_run(), DataFacts(FACTS.categories, 9), **SAME)
    rebuilt = dataclasses.replace(FACTS, sha256={"toy": "9f"})
    message = r"what is read as 'toy' has changed \(other SHA-256\). Go on with the same, or"
    with pytest.raises(ValueError, match=message):
        resume.check_resumable(checkpoint.latest(tmp_path), toy_run(), rebuilt, **SAME)


@pytest.mark.parametrize("changed", [{"world": 4}, {"stage": 2}, {"dtype": torch.bfloat16}])
def test_another_number_of_ranks_stage_or_precision_is_refused(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    (key,) = changed
    with pytest.raises(
        ValueError, match=rf"written with {key}=.* use as many ranks and the same --ds-config"
    ):
        resume.check_resumable(_whole(tmp_path, 3), toy_run(), FACTS, **SAME | changed)


def test_a_kill_while_saving_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    codes, output = start(tmp_path, "die_while_saving", world=1)
    assert codes == [-signal.SIGKILL], output
    out = tmp_path / "die_while_saving"
    assert checkpoint.latest(out, hashes=True) == checkpoint.checkpoint_folder(out, 1)
    left_over = out / "checkpoints" / ".tmp-step_000002"
    assert left_over.is_dir()
    again = checkpoint.checkpoint_folder(out, 2)
    checkpoint._make_room(again, again.with_name(".tmp-step_000002"), 0)
    assert list(left_over.rglob("*.safetensors")) == []


def test_a_disk_that_fills_while_torch_writes_is_known_by_its_error(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, torch; from pretrain.checkpoint import _is_of_the_disk\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: torch.save(torch.zeros(1_000_000), sys.argv[1])\n"
        "except Exception as error: sys.exit(0 if _is_of_the_disk(error) else repr(error))\n"
        "sys.exit('nothing was raised')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
