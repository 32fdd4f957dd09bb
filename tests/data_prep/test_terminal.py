"""What does a person at the terminal learn: before a build, while it runs, and at its end?"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial

import pytest

from data_prep import estimate as estimate_module
from data_prep.__main__ import main
from data_prep.build import Options, build
from data_prep.engines import ENGINES
from data_prep.estimate import estimate
from data_prep.output import read_manifest
from data_prep.places import place_of
from data_prep.plan import shard_ranges
from data_prep.progress import shard_progress
from data_prep.samples import Dropped, Made
from tests.data_prep.disturbed import OPTIONS, collection

COMMAND = ["build", "scenes", "--count", "18", "--heldout", "0", "--size", "32", "--shard-size", "4"]


def test_a_dry_run_tells_shards_bytes_time_and_disk_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "not" / "there"
    assert main([*COMMAND, "--workers", "1", "--out", str(out), "--dry-run"]) == 0
    told = capsys.readouterr().out
    for words in (
        "18 items of scenes/train in 5 shards",
        "KiB by 18 items",
        "with 1 workers at",
        "are free in",
    ):
        assert words in told
    assert told.endswith("nothing was written\n") and not list(tmp_path.iterdir())


def test_the_estimated_size_is_near_the_real_one(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate_module, "MOST_ITEMS", 9)
    told = estimate(collection(), place_of(tmp_path), OPTIONS)
    assert "by 9 items" in told
    kibibytes = float(told.partition("  size  ")[2].partition(" KiB")[0])
    build(collection(), tmp_path / "d", OPTIONS)
    real = sum(shard.num_bytes for shard in read_manifest(place_of(tmp_path / "d")).shards) / 1024
    assert kibibytes == pytest.approx(real, rel=0.4)  # every tar ends in up to 10 KiB of zeros


def test_a_dry_run_makes_no_item_that_is_still_to_be_downloaded(tmp_path):
    def unmade(item: object) -> Made:
        raise AssertionError("it was made")

    remote = replace(collection(), make=unmade, shard_sizes=[10, 8], num_bytes=2**21)
    assert "in 2 shards\n  size  2.0 MiB as the source guesses" in estimate(
        remote, place_of(tmp_path), OPTIONS
    )


def test_a_limit_builds_the_first_items_and_is_part_of_the_settings(tmp_path):
    command = [*COMMAND, "--workers", "1", "--out", str(tmp_path / "d")]
    assert main([*command, "--limit", "6"]) == 0
    manifest = read_manifest(place_of(tmp_path / "d" / "train"))
    assert [shard.num_samples for shard in manifest.shards] == [4, 2] and manifest.builder["limit"] == 6
    assert main(command) == 1  # the whole is another data set


def test_the_end_tells_the_next_command(tmp_path, capsys):
    assert main([*COMMAND, "--workers", "1", "--out", str(tmp_path / "d")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: python -m data_prep check {tmp_path / 'd'}"


def test_a_log_shows_shards_rate_reasons_and_eta_in_one_line(capsys):
    with shard_progress(100, "cats/train", 5, done=20) as progress:
        progress.finish({"truncated": 1})
        progress.advance(40)
        progress.finish({"truncated": 2, "corrupt": 1})
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("cats/train:  60% 60/100 ") and "image/s elapsed" in line and "ETA" in line
    assert line.endswith("shards 2/5, left out: corrupt 1, truncated 3")


def _bad(index: int, make) -> Made:
    return Made(None, (Dropped(str(index), "corrupt"),)) if index % 9 == 0 else make(index)


def test_shards_of_fixed_sizes_are_kept_and_their_sizes_are_settings(tmp_path):
    fixed = replace(collection(), shard_sizes=[7, 0, 11])
    assert [len(one) for one in shard_ranges(fixed, 500)] == [7, 0, 11]
    assert [len(one) for one in shard_ranges(fixed, 500, limit=8)] == [7, 0, 1]
    build(replace(fixed, make=partial(_bad, make=fixed.make)), tmp_path / "d", replace(OPTIONS, max_bad=0.2))
    manifest = read_manifest(place_of(tmp_path / "d"))
    assert [(shard.name, shard.num_samples) for shard in manifest.shards] == [
        ("000000.tar", 6),
        ("000002.tar", 10),
    ]
    assert manifest.dropped == {"corrupt": 2}
    with pytest.raises(ValueError, match="shard_sizes_sha256"):
        build(replace(fixed, shard_sizes=[8, 10]), tmp_path / "d", OPTIONS)
    with pytest.raises(ValueError, match=r"sum up to 17, its items are 18"):
        shard_ranges(replace(fixed, shard_sizes=[7, 10]), 500)


def test_an_unknown_engine_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"engine='dask' is unknown; choose from \['local', 'ray', 'spark'\]"
    ):
        Options(engine="dask")


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("spark", "pyspark")])
def test_an_engine_makes_the_same_bytes_or_says_what_to_install(tmp_path, engine, package, capsys):
    command = [*COMMAND, "--workers", "2", "--engine", engine, "--out", str(tmp_path / engine)]
    if importlib.util.find_spec(package) is None:
        assert main(command) == 1
        assert f"error: engine='{engine}' needs the package {package} here" in capsys.readouterr().err
        pytest.skip(f"the package {package} is not installed")
    assert main(command) == 0
    build(collection(), tmp_path / "local", OPTIONS)
    files = sorted(path for path in (tmp_path / "local").rglob("*") if path.is_file())
    assert files and len(ENGINES) == 3
    for path in files:
        there = tmp_path / engine / "train" / path.relative_to(tmp_path / "local")
        assert there.read_bytes() == path.read_bytes()
