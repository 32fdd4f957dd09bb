"""What does a person at the terminal learn: before a build, while it runs, and at its end?"""

from __future__ import annotations

import bz2
import errno
import importlib.util
import os
import re
import shlex
from dataclasses import replace
from functools import partial

import pytest

from data_prep import estimate as estimate_module
from data_prep import output
from data_prep.__main__ import SOURCES, main
from data_prep.build import Options, build
from data_prep.doctor.commands import DOCTOR
from data_prep.engines import ENGINES
from data_prep.estimate import estimate
from data_prep.output import explained, read_manifest
from data_prep.places import place_of
from data_prep.plan import shard_ranges
from data_prep.progress import shard_progress
from data_prep.samples import Dropped, Made
from data_prep.settings import difference
from data_prep.sources.scratch import on_disk
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
    assert main([*COMMAND, "--workers", "1", "--out", str(tmp_path / "my d")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: ") and shlex.split(last)[-2:] == ["check", str(tmp_path / "my d")]


def test_a_log_shows_shards_rate_reasons_and_eta_in_one_line(capsys):
    with shard_progress(100, "cats/train", 5, done=20) as progress:
        progress.finish({"truncated": 1})
        progress.advance(40)
        progress.finish({"truncated": 2, "corrupt": 1})
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("cats/train:  60% 60/100 ") and "image/s elapsed" in line and "ETA" in line
    assert line.endswith("shards 2/5, left out: corrupt 1, truncated 3")


def _all_bad(index: int) -> Made:
    return Made(None, (Dropped(str(index), "corrupt"),))


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


@pytest.mark.parametrize("command", [*(["build", name] for name in SOURCES), *([name] for name in DOCTOR)])
def test_every_option_says_what_it_is_for(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    told = "\n".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())
    kind = r"(?:[A-Z]+|\[[A-Z]+ \[[A-Z]+ \.\.\.\]\]|\{[^}]*\})?"
    mute = re.findall(
        rf"^(--[a-z-]+(?:, --no-[a-z-]+)?)\s*{kind}\s*\((?:default|required)", told, re.MULTILINE
    )
    assert not mute and "--help" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scenes", "--count", "0"], "count=0 must be at least 1 scene"),
        (["scenes", "--work", "s3://bucket/w"], "work='s3://bucket/w' is a URL, shards are made on a disk"),
        (["scenes", "--shard-size", "9999999"], "shard_size=9999999 must lie in [1, 100000]"),
        (
            ["cc12m", "--from", "x", "--scratch", "y", "--metadata-memory", "3"],
            "metadata_memory='3' must be a number",
        ),
    ],
)
def test_a_bad_value_is_told_without_names_of_our_own(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["build", *words, "--out", str(tmp_path / "out")])
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert ended.value.code == 2 and message in told and "dummy" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cc12m", "--from", "here"], "here is a folder, a file is needed: pass the file in it"),
        (["cc12m", "--from", "none"], "none does not exist: check the path, or download it first"),
        (
            ["cc12m", "--from", "x.parquet"],
            "x.parquet is a parquet file, a text with the columns ['url', 'caption']",
        ),
        (["scenes", "--count", "8", "--out", "x.tsv"], "x.tsv is a file, a build needs an empty folder"),
        (
            ["scenes", "--count", "8", "--out", "/proc/x"],
            "/proc/x/train cannot be made or written (No such file or directory): mend the owner or mount of that",
        ),
        (["scenes", "--count", "8", "--out", "pipe/x"], "pipe is no folder, a build needs an empty folder"),
        (["laion400m", "--from", "here"], "here is a folder without .parquet files: pass the parquet parts"),
        (
            ["laion400m", "--from", "x.tsv"],
            "x.tsv is no parquet file, it begins with b'http': pass the parquet parts",
        ),
        (["laion400m", "--from", "x.parquet"], "x.parquet is a parquet file that was cut off or damaged"),
        (["imagenet22k", "--from", "x.tar.bz2"], "it is packed by bzip2, unpack it first; pass a plain tar"),
        (["folder", "--from", "none"], "none does not exist: pass --from a folder of images or a .tar"),
        (
            ["cc12m", "--from", "x.tsv", "--scratch", "s3://bucket/s"],
            "is a URL, databases and downloads need a folder",
        ),
    ],
)
def test_a_wrong_input_is_told_as_what_it_is(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(200))
    (tmp_path / "x.tsv").write_text("http://example.com/\tcaption\n")
    (tmp_path / "x.tar.bz2").write_bytes(bz2.compress(bytes(1024)))
    os.mkfifo("pipe")
    scratch = [] if "--scratch" in words or words[0] in ("folder", "scenes") else ["--scratch", "s"]
    out = [] if "--out" in words else ["--out", "out"]
    assert main(["build", *words, *scratch, *out]) == 1
    assert message in capsys.readouterr().err


def test_nobody_is_told_to_allow_more_bad_items_when_none_is_good(tmp_path):
    broken = replace(collection(), make=partial(_all_bad))
    with pytest.raises(ValueError, match=r"none of 4 inputs is good .* so far, of 18: see") as caught:
        build(broken, tmp_path / "d", OPTIONS)
    assert "--max-bad" not in str(caught.value)
    with pytest.raises(ValueError, match=r"none of 18 inputs is good .*mend the input") as caught:
        build(broken, tmp_path / "all", replace(OPTIONS, max_bad=1.0))
    assert "--max-bad" not in str(caught.value)


def test_settings_that_differ_are_told_field_by_field():
    there = {"limits": {"min_side": 32, "short_side": 0}, "seed": 0, "hash": "a" * 100}
    asked = {"limits": {"min_side": 64, "short_side": 0}, "seed": 0, "hash": "a" * 99, "prompts": ["{}"]}
    told = difference(there, asked).split("; ")
    assert told[0].startswith('hash: "aaa') and "..." in told[0]
    assert told[1:] == ["limits.min_side: 32 there, 64 asked", 'prompts: nothing there, ["{}"] asked']
    assert difference(there, dict(there)) == ""


def test_a_full_disk_is_named_by_whoever_knows_which_it_was(tmp_path, monkeypatch):
    free = {tmp_path / "set": 2**30, tmp_path / "work": 0}
    monkeypatch.setattr(output, "free_bytes", free.__getitem__)
    here = explained(place_of(tmp_path / "set"), tmp_path / "work")
    with pytest.raises(OSError, match=r"no space left in .*work, where shards for .*set are made"), here:
        raise OSError(errno.ENOSPC, "No space left on device")
    here = explained(place_of(tmp_path / "set"), tmp_path / "work")
    with (
        pytest.raises(OSError, match=r"no space left in .*scratch, where lists"),
        here,
        on_disk(tmp_path / "scratch"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


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
