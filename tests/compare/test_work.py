"""Is every job done once, whatever is interrupted or fails in between?"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.compare.comparisons import Variant
from pretrain.compare.plan import TRAIN, Job, Task
from pretrain.compare.work import prepare, shell_line, tasks_left, work_off
from pretrain.recipes import load
from tests.paths import ROOT

STEPS = 3


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", f"from pathlib import Path; import json, sys; {code}"


def job(folder: Path, name: str, train: str = "pass", evaluate: str = "pass") -> Job:
    """Training leaves a whole checkpoint, evaluation a result; both count how often they ran."""
    place = folder / name
    counted = f"log = Path({str(place)!r}); open(log / 'count', 'a').write(sys.argv[0][:1] or '-')"
    done = place / "checkpoints" / f"step_{STEPS:06d}"
    whole = json.dumps({"files": {}})
    trained = f"p = Path({str(done)!r}); p.mkdir(parents=True); (p / 'COMPLETE').write_text({whole!r})"
    result = (
        f"Path({str(place / 'evaluation-a.json')!r}).write_text(json.dumps({{'checkpoints': {{'s': 1}}}}))"
    )
    run = replace(
        load("rows.auto_encoder_demo"),
        steps=STEPS,
        save_every=STEPS,
        optim=replace(load("m3i.demo").optim, warmup=1),
    )
    return Job(
        Variant(name, "auto_encoder"),
        run,
        place,
        (
            Task(TRAIN, python(f"{counted}; {train}; {trained}"), {"data": {"scenes": "1"}, "guide": None}),
            Task("a", python(f"{counted}; {evaluate}; {result}"), {"fine_tune": 0}),
        ),
    )


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name) for name in ("one", "two", "three")]
    assert work_off(jobs, 2) == []
    assert work_off(jobs, 2) == []
    assert [(one.folder / "count").read_text() for one in jobs] == ["--"] * 3
    (jobs[1].folder / "evaluation-a.json").write_text('{"checkpo')
    assert len(tasks_left(jobs[1])) == 1 and tasks_left(jobs[0]) == []
    assert work_off(jobs, 2) == []
    assert [(one.folder / "count").read_text() for one in jobs] == ["--", "---", "--"]


def test_a_failed_job_is_told_and_does_not_hold_the_others_up(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "bad", train="print('no such label'); sys.exit(3)"), job(tmp_path, "good")]
    told: list[str] = []
    (failure,) = work_off(jobs, 1, say=told.append)
    assert failure.job.variant.name == "bad" and failure.code == 3 and failure.told == "no such label"
    assert "output.txt" in told[0] and "no such label" in told[0]
    assert tasks_left(jobs[1]) == [] and len(tasks_left(jobs[0])) == 2


def test_a_folder_of_another_recipe_is_refused_before_anything_runs(tmp_path: Path) -> None:
    first = job(tmp_path, "one")
    assert work_off([first], 1) == []
    other = replace(first, run=replace(first.run, batch=32))
    with pytest.raises(ValueError, match="prepared by --dry-run, with another recipe"):
        work_off([other, job(tmp_path, "two")], 1)
    assert not (tmp_path / "two").exists()


def test_a_folder_that_is_older_than_a_field_of_recipes_goes_on(tmp_path: Path) -> None:
    first = job(tmp_path, "one")
    assert work_off([first], 1) == []
    asked = json.loads(first.recipe.read_text())
    del asked["pool"]["kind"]
    first.recipe.write_text(json.dumps(asked))
    assert tasks_left(first) == []
    first.recipe.write_text("{")
    with pytest.raises(ValueError, match="with another recipe"):
        tasks_left(first)


def test_what_was_asked_otherwise_is_evaluated_again_but_never_trained_over(tmp_path: Path) -> None:
    first = job(tmp_path, "one")
    assert work_off([first], 1) == []
    train, evaluate = first.tasks
    tuned = replace(first, tasks=(train, replace(evaluate, asked={"fine_tune": 30})))
    assert [task.name for task in tasks_left(tuned)] == ["a"]
    other = replace(first, tasks=(replace(train, asked={"data": {"scenes": "2"}, "guide": None}), evaluate))
    with pytest.raises(ValueError, match="other data or another guide"):
        tasks_left(other)


def test_a_printed_line_does_the_task_and_counts_it_as_done(tmp_path: Path) -> None:
    one = job(tmp_path, "one")
    prepare(one)
    for task in one.tasks:
        subprocess.run(shell_line(one, task), shell=True, check=True, cwd="/")
    assert tasks_left(one) == [] and work_off([one], 1) == []
    assert (one.folder / "count").read_text() == "--"


def test_a_training_that_outlived_its_comparison_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.compare.work.SECONDS_TO_LOOK_AGAIN", 0.05)
    orphaned = job(tmp_path, "orphaned")
    hold = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pretrain.lock import only_writer
with only_writer(Path({str(orphaned.folder)!r})):
    print("held", flush=True)
    time.sleep(1)
"""
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert work_off([orphaned], 1) == []
    assert "waiting: " in capsys.readouterr().out and (orphaned.folder / "count").read_text() == "--"


def test_an_interrupt_ends_what_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = job(tmp_path, "slow", train="open(log / 'begun', 'w').close(); import time; time.sleep(600)")

    def interrupted(futures):
        while not (slow.folder / "begun").exists():
            assert any(not future.done() for future in futures)
        raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.compare.work.as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work_off([slow], 1)
    assert len(tasks_left(slow)) == 2
    assert json.loads((slow.folder / "asked.json").read_text())["steps"] == STEPS
