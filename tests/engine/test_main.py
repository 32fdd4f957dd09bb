"""Does the command line refuse what cannot be right at once, and go on after a kill as if there had been none?"""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from pretrain import recipes
from pretrain.arguments import override, parse, steps_of
from pretrain.exits import MISTAKE
from pretrain.main import explain, main
from tests.engine.launch import TIMEOUT, environment, run_ranks
from tests.paths import ROOT

SOURCES = ["labelled=tests", "captioned=jobs"]  # folders that exist
GOOD = ["--recipe", "m3i.demo", "--data", *SOURCES, "--out", "out"]


def test_a_source_may_have_a_point_in_its_name() -> None:
    run = recipes.load("m3i.demo")
    run = replace(run, data={"laion.400m": run.data["labelled"]})
    assert override(run, ["--data.laion.400m.weight", "2"]).data["laion.400m"].weight == 2
    with pytest.raises(ValueError, match="names the source 'laion'"):
        override(run, ["--data.laion.weight", "2"])


def test_overrides_are_typed_and_nested() -> None:
    run, paths = parse([*GOOD, "--optim.lr", "3e-4", "--data.labelled.weight", "2", "--local_rank=0"])
    assert run.optim.lr == 3e-4
    assert run.data["labelled"].weight == 2
    assert run.decoder == recipes.load("m3i.demo").decoder
    assert paths.data == {"labelled": Path("tests"), "captioned": Path("jobs")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "--optim.lr"),  # the remedy: the option that was meant
        (["--optim.lr", "fast"], "--optim.lr 'fast' must be a number, such as 0.0006"),
        (["--steps=4.5"], "--steps '4.5' must be a whole number, such as 500"),
        (["--data.labelled.weight", "much"], "--data.labelled.weight 'much' must be a number, such as 4"),
        (["--optim.lr", "-1"], "optim.lr=-1.0 must be positive"),
        (
            ["--recipe", "m3i.dmo"],
            "recipe='m3i.dmo' is unknown, did you mean 'm3i.demo'? choose from ['m3i.vit_b16'",
        ),
        (["--data", "labelled"], "--data 'labelled' must look like NAME=DIR"),
        (
            ["--data", *SOURCES, "labelled=jobs"],
            "--data names 'labelled' twice: give every folder a name of its own",
        ),
        (["--data", "=tests"], "--data '=tests' must look like NAME=DIR"),
        (["--data", "labelled="], "--data 'labelled=' must look like NAME=DIR"),
        (
            ["--data", "labelled=nowhere"],
            "--data labelled=nowhere: nowhere is no folder; name one that exists",
        ),
        (
            ["--batch", "63"],
            "batch=63 counts images and must be a multiple of objective.input.mixed=2: set 64",
        ),
        (["--out", "README.md"], "--out README.md is a file: name a folder"),
        (["--data", "labelled=tests"], "recipe m3i.demo has the sources ['captioned', 'labelled']: give"),
        (["--ds_config", "no.json"], "--ds_config is unknown, did you mean --ds-config?"),
        (["--ds-config", "no.json"], "--ds-config no.json is no file; choose one of"),
        (["--workers", "-1"], "--workers -1 must not be negative"),
        (["--evaluate-every", "5"], "--evaluate-every 5 with --evaluate-data None: give a positive number"),
        (["--evaluate-every", "5", "--evaluate-data", "tests"], "--evaluate-data tests has no train/: "),
        (["--timeout", "inf"], "--timeout inf must be positive, at most 1000000: seconds"),
        (["--views.jitter", "nan", "0", "0", "0"], "views.jitter=(nan, 0.0, 0.0, 0.0) must not be negative"),
        (["--guard.deviations", "inf"], "guard.deviations=inf must be a finite number: leave it out"),
        (
            ["--data.nosuch.weight", "1"],
            "names the source 'nosuch', but recipe m3i.demo has the sources ['captioned', 'labelled']: choose",
        ),
        (["--micro-batches", "0"], "--micro-batches 0 must be positive"),
        (["--guide", "clip"], "--guide clip would be ignored, no target of recipe 'm3i.demo' asks for it"),
        (
            ["--recipe", "mvp.vit_b16", "--data", "imagenet1k=tests"],
            "name its folder by --guide (a CLIP or vision",
        ),
        (
            ["--recipe", "mvp.vit_b16", "--data", "imagenet1k=tests", "--guide", "nowhere"],
            "--guide nowhere is no folder",
        ),
        (["--recipe", "asked.json"], "--recipe asked.json is no file"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([*GOOD, *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == MISTAKE
    printed = capsys.readouterr()
    assert message in " ".join((printed.out + printed.err).replace("│", " ").split())


def test_a_limit_of_copies_that_is_none_is_refused_with_the_words_that_need_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("M3I_CACHE_GIB", "inf")
    parse(GOOD)  # has no copies
    with pytest.raises(ValueError, match="M3I_CACHE_GIB='inf' must be a positive number"):
        parse([*GOOD, "--data", SOURCES[0], "captioned=s3://bucket/set"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged.json does not describe a run, since Invalid JSON: EOF while parsing a value"),
        ("[]", "damaged.json does not describe a run, since []: Input should be an object"),
        ('{"name": 3}', "since name=3: Input should be a valid string; objective is missing"),
    ],
)
def test_a_recipe_file_that_does_not_fit_is_told_by_its_name(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged.json").write_text(text)
    assert main([*GOOD, "--recipe", str(tmp_path / "damaged.json")]) == MISTAKE
    printed = capsys.readouterr().err
    assert message in printed and "copy the recipe.json of a run" in printed and "pydantic" not in printed


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    for arguments in ([*GOOD, "--optim.lrr", "1"], [*GOOD, "--batch", "63"], [], ["--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert main([*GOOD, "--workers", "-1"]) == MISTAKE
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


def test_a_folder_that_one_node_lacks_is_told_by_its_first_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for rank, local_rank in (("8", "0"), ("9", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main([*GOOD, "--data", "labelled=nowhere", "captioned=jobs"]) == MISTAKE
        assert main([*GOOD, "--workers", "-1"]) == MISTAKE
        told.append(capsys.readouterr().err)
    assert told == ["error: --data labelled=nowhere: nowhere is no folder; name one that exists\n", ""]


def test_help_lists_every_field_with_the_value_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--recipe=m3i.vit_b16", "--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert not ended.value.code
    assert "--ds-config" in printed and "The fields of m3i.vit_b16" in printed
    assert "--teacher.momentum FLOAT at step 0 (default: 0.995)" in printed


def test_mistakes_are_told_before_torch_is_loaded() -> None:
    code = (
        "import sys; from pretrain.main import main; sys.exit(main(sys.argv[1:]) + ('torch' in sys.modules))"
    )
    command = [sys.executable, "-c", code, *GOOD, "--workers", "-1"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == MISTAKE


def test_a_full_disk_is_told_with_its_remedy() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "No space left" in explain(full, Path("runs/a")) and "--out runs/a; free" in explain(
        full, Path("runs/a")
    )
    assert explain(OSError("as it was"), Path("runs/a")) == "as it was"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    small = ["--count", "64", "--size", "64", "--workers", "1"]
    assert data_prep(["build", "scenes", "--out", str(folder), *small]) == 0
    return folder / "train"


def _command(scenes: Path, out: Path, *more: str) -> list[str]:
    data = [f"labelled={scenes}", f"captioned={scenes}"]
    small = "--batch 4 --steps 6 --save_every 2 --log_every 1 --optim.warmup 1 --backbone.drop_path 0.5"
    start = [str(ROOT / "pretrain" / "main.py"), "--recipe", "m3i.demo", "--out", str(out)]
    return [*start, "--data", *data, *small.split(), *more]


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code and output of a process of its own."""
    done = subprocess.run(
        [sys.executable, *command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout


def _fork(command: list[str], log: Path, kill_at: str | None = None) -> tuple[int, str]:
    """The same of a fork of a process that is warm: ten seconds of a processor less."""
    (code,) = run_ranks(command, log, world=1, kill_at=kill_at)
    return code, log.read_text()


def _curve(out: Path) -> list[tuple[int, dict[str, float]]]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["nats"] | {"lambda": r["lambda"], "grad_norm": r["grad_norm"]}) for r in records]


def _check_log(out: Path, output: str) -> None:
    """What the monitor left of a whole run of six steps, each of them logged."""
    assert (
        "DCNv3 sparse, steps around it torch, channels-last, AdamW of torch (plain), attention flash;"
        in output
    )
    assert "FLOP a step" in output and "FLOP / (step seconds x 1 ranks x peak)" in output
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for before, record in pairwise(records):
        passed = (
            record["time"] - before["time"]
        )  # by another clock, and from just after the look at the first
        assert sum(record["seconds"].values()) == pytest.approx(record["step_seconds"], rel=1e-6)
        assert record["step_seconds"] == pytest.approx(passed, rel=0.02, abs=0.02)
        assert record["mfu"] > 0 and record["cost"] == pytest.approx(2 * record["gpu_hours"])
        assert {"labelled", "captioned"} >= record["nats_by_source"]["image_same"].keys()
    parts = {part for record in records for part, seconds in record["seconds"].items() if seconds > 1e-4}
    assert parts >= {"data_wait", "forward", "teacher", "backward", "optimizer", "save", "log"}
    assert records[-1]["eta_seconds"] == 0 and records[-1]["cost_left"] == 0
    assert records[-1]["memory_bytes"]["host"] > 2**27
    with gzip.open(out / "trace" / "steps_2-3.json.gz") as trace:
        ranges = [event["name"] for event in json.load(trace)["traceEvents"] if "name" in event]
    assert ranges.count("backward") == ranges.count("optimizer") == 2
    assert "aten::" in (out / "trace" / "steps_2-3.txt").read_text()
    assert len(list((out / "tensorboard").iterdir())) == 1


def _check_evaluation(out: Path, output: str) -> None:
    """What the log has of a run of six steps whose teacher was evaluated every two."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [record["evaluation"] for record in records if "evaluation" in record]
    assert [row["step"] for row in found] == [2, 4, 6]
    for rows in found:
        for name in ("knn", "zero_shot"):
            low, high = rows[name]["interval"]
            assert 0 <= low <= rows[name]["accuracy"] <= high <= 1 and rows[name]["n"] == 8
    assert output.count("teacher of step ") == 3


@pytest.mark.parametrize("wrong", ["3", "0:2", "4:2", "a:b"])
def test_a_profile_that_names_no_steps_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"must be FIRST:LAST, steps counted from 1, such as 10:12"):
        steps_of(wrong)
    assert steps_of("10:12") == (10, 12)


def test_a_killed_run_goes_on_as_if_it_had_not_been(scenes: Path, tmp_path: Path) -> None:
    # The teacher of this one is evaluated meanwhile, which the others must not tell from their curves.
    evaluated = ["--evaluate-every", "2", "--evaluate-data", str(scenes.parent)]
    more = ["--tensorboard", "--profile", "2:3", "--price", "2", *evaluated]
    code, output = _run(_command(scenes, tmp_path / "straight", *more))
    assert code == 0, output
    _check_log(tmp_path / "straight", output)
    _check_evaluation(tmp_path / "straight", output)
    log = tmp_path / "killed.txt"
    code, output = _fork(_command(scenes, tmp_path / "killed"), log, kill_at="step 5/6")
    assert code == -signal.SIGKILL, output
    code, output = _fork(_command(scenes, tmp_path / "killed"), log)
    assert code == 0, output
    assert "step_000004" in output
    assert _curve(tmp_path / "killed") == _curve(tmp_path / "straight")

    code, output = _fork(_command(scenes, tmp_path / "killed", "--optim.lr", "0.5"), log)
    assert code == 1
    saved = recipes.load("m3i.demo").optim.lr
    assert f"run.optim.lr was {saved}, is 0.5. Go on with the same" in output
    assert "Traceback" not in output
