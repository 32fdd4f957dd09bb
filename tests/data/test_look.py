"""Does `python -m pretrain.data` tell what a run is fed, and what is wrong with it?"""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from pretrain.config import Mixing, Source
from pretrain.data.__main__ import main
from pretrain.data.measure import count_sources, measure
from pretrain.data.steps import STAGES
from pretrain.facts import DataFacts
from pretrain.objective import Input, Objective, Target
from pretrain.served import left_out
from tests.data.sets import good_set, sample, small_run, write_set, write_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    write_tokenizer(good_set(root / "talk", (8, 4), has_category=False) / "tokenizer")
    return {"names": good_set(root / "names", has_text=False), "talk": root / "talk"}


def write_recipe(folder: Path, **changes: object) -> Path:
    path = folder / "small.json"
    path.write_text(small_run(**changes).to_json())
    return path


def test_sources_are_counted_with_shares_and_passes(folders: dict[str, Path]) -> None:
    names, talk = count_sources(small_run(), folders, None)
    assert (names.num_samples, talk.num_samples, talk.num_shards) == (21, 12, 2)
    assert names.share == pytest.approx(2 / 3) and names.reached == pytest.approx(2 / 3, abs=1e-3)
    assert names.epochs == pytest.approx(0.667 * 2000 * 8 / 21)  # as its share is reached, in every thousand
    data = {"names": Source("category"), "talk": Source("text")}
    by_size = small_run(data=data, mixing=Mixing(by="size"))
    assert [source.share for source in count_sources(by_size, folders, None)] == [21 / 33, 12 / 33]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_stage_is_timed_on_the_training_loader(folders: dict[str, Path], workers: int) -> None:
    # What other tests of this process held counts in its peak.
    before = 0 if workers else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = measure(small_run(), folders, None, 100, workers)
    assert measured.num_images == 128 and measured.num_timed == 64  # whole batches of 32 pairs
    assert tuple(measured.stages) == STAGES and min(measured.stages.values()) > 0
    assert measured.rate > 0 and measured.first_seconds > 0 and not measured.dropped
    assert measured.peak_bytes is None or 50 * 2**20 < measured.peak_bytes < before + 1.5 * 2**30
    mean, full = measured.tokens
    assert 5 <= mean <= 10 and 0 < full < 1  # 3 words and 2 special tokens; longer are cut at 10


def test_the_page_shows_sources_stages_and_inputs(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [f"{name}={folder}" for name, folder in folders.items()]
    recipe, page = write_recipe(tmp_path), tmp_path / "data.html"
    options = ["--images", "64", "--out", str(page)]
    assert main([*pairs, "--recipe", str(recipe), *options, "--mixing.pairs", "same"]) == 0
    printed, text = capsys.readouterr().out, page.read_text()
    for told in (
        "names",
        "66.7",
        "decode",
        "too few images to tell the rate",
        "No sample had to be replaced",
    ):
        assert told in printed.replace("\u00a0", " ") and told in text.replace("\u00a0", " ")
    assert text.count("Pair ") == 6 and "mixed input" in text and "<h1>What small is fed</h1>" in text
    assert f"written to {page}" in printed
    assert "http" not in text.replace("http://www.w3.org", "")  # nothing is fetched


def test_replaced_samples_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [sample(number, has_text=False) for number in range(60)]
    samples[7]["jpg"] = samples[7]["jpg"][:-30]
    folder = write_set(tmp_path / "names", [samples])
    recipe = write_recipe(tmp_path, data={"names": Source("category")}, max_bad=0.0)
    page = tmp_path / "page.html"
    assert main([str(folder), "--recipe", str(recipe), "--images", "64", "--out", str(page)]) == 0
    told = capsys.readouterr().out
    assert "Replaced: names: truncated" in told
    assert "Training would stop here: " in told and "max_bad=0.0 allows 0: run `python -m data_prep" in told
    assert "Training would stop here: " in page.read_text()
    lines = [json.loads(line) for line in (tmp_path / "page.dropped.jsonl").read_text().splitlines()]
    assert {(line["source"], line["index"], line["reason"]) for line in lines} == {("names", 7, "truncated")}


def test_the_page_shows_what_is_good_of_data_that_training_would_stop_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [sample(number, has_text=False) for number in range(24)]
    for bad in samples[::2]:
        bad["jpg"] = bad["jpg"][:-30]
    folder = write_set(tmp_path / "names", [samples])
    recipe = write_recipe(tmp_path, data={"names": Source("category")}, max_bad=0.0)
    page = tmp_path / "page.html"
    assert main([str(folder), "--recipe", str(recipe), "--images", "64", "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("Pair ") == 6 and "Training would stop here: " in text and "names: truncated" in text
    assert f"written to {page}" in capsys.readouterr().out


def test_targets_that_the_data_cannot_serve_are_told_as_in_training(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(data={"names": Source("category")})
    (tmp_path / "small.json").write_text(run.to_json())
    page = tmp_path / "page.html"
    options = ["--recipe", str(tmp_path / "small.json"), "--images", "64", "--out", str(page)]
    assert main([str(folders["names"]), *options]) == 0
    line = left_out(run, DataFacts(categories=("ant", "bee", "cow"), vocab_size=0))
    assert line is not None and line in capsys.readouterr().out
    assert "LEFT OUT of the objective of small: text (no source has supervision=" in page.read_text()


def test_an_objective_that_the_data_cannot_serve_at_all_is_told(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = Objective(Input(), {"text": Target("text", "boltzmann")})
    recipe = write_recipe(tmp_path, data={"names": Source("none")}, objective=objective)
    options = ["--recipe", str(recipe), "--images", "64", "--out", str(tmp_path / "page.html")]
    assert main([str(folders["names"]), *options]) == 0
    assert "Training would stop here: none of the targets ['text'] has labels" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_the_page_of_data_without_a_good_sample_says_why_and_the_exit_code_tells(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [{**sample(number, has_text=False), "jpg": b"no image"} for number in range(8)]
    folder = write_set(tmp_path / "names", [samples])
    recipe = write_recipe(tmp_path, data={"names": Source("category")})
    page = tmp_path / "page.html"
    options = ["--images", "64", "--workers", str(workers), "--out", str(page)]
    assert main([str(folder), "--recipe", str(recipe), *options]) == 1
    why = "32 samples of source &#x27;names&#x27; in turn cannot be used, the last: names/000000.tar sample"
    assert page.read_text().count(why) == 2 and "not_an_image" in page.read_text()  # below stages and inputs
    told = capsys.readouterr()
    assert f"written to {page}" in told.out and "error: 32 samples of source 'names' in turn" in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images 0 must be at least 1"),
        (["--workers", "-1"], "--workers -1 not negative"),
        (["--out", "."], "--out . must be a file in a folder that exists"),
        (["--out", "/proc/page.html"], "--out /proc/page.html cannot be written (No such file or directory)"),
        (["--mixing.pairs", "other", "--data.names.weight", "9"], "one source gives 0.9 of all where half"),
    ],
)
def test_a_mistake_is_told_in_one_message(
    arguments: list[str],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = [f"{name}={folder}" for name, folder in folders.items()]
    recipe = write_recipe(tmp_path)
    assert main([*pairs, "--recipe", str(recipe), "--out", str(tmp_path / "x.html"), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_pipe_is_not_replaced_by_the_page(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [f"{name}={folder}" for name, folder in folders.items()]
    pipe = tmp_path / "page.html"
    os.mkfifo(pipe)
    assert main([*pairs, "--recipe", str(write_recipe(tmp_path)), "--out", str(pipe)]) == 1
    assert (
        f"--out {pipe} is a device, pipe or socket, and would be replaced: name a file"
        in capsys.readouterr().err
    )
    assert pipe.is_fifo()


def test_errors_call_this_command_by_its_own_name(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"names={folders['names']}", "--recipe", str(write_recipe(tmp_path))]
    assert main(command) == 1
    assert "the command line names ['names'], but recipe small has" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--nothing", "1"])
    told = capsys.readouterr().err
    assert "python -m pretrain.data" in told and "main.py" not in told
