"""Are shards whole, reproducible and resumable, whatever interrupts the build?"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import webdataset

from data_prep import shard as shard_module
from data_prep.__main__ import main
from data_prep.build import Options, build
from data_prep.check import check
from data_prep.engines import local
from data_prep.files import sha256_file
from data_prep.index import read_index
from data_prep.samples import Collection, Dropped, Made
from data_prep.schema import IMAGE_EXTENSIONS, Manifest, counts_by_reason
from data_prep.sources.scenes import Scenes
from tests.data_prep.disturbed import kills_itself
from tests.paths import ROOT

SCENES = Scenes(count=24, heldout=0, size=32)
OPTIONS = Options(shard_size=5, workers=1)


def _collection() -> Collection:
    return SCENES.collections()[0]


def _contents(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "scenes"
    assert build(_collection(), folder, OPTIONS)
    return folder


def test_two_workers_and_one_write_the_same_bytes(built, tmp_path):
    build(_collection(), tmp_path / "again", replace(OPTIONS, workers=2))
    assert _contents(tmp_path / "again") == _contents(built)


def test_the_folder_holds_shards_indices_tokenizer_and_manifest_only(built):
    names = {name.split("/")[0] for name in _contents(built)}
    shards = {f"{i:06d}.tar{ending}" for i in range(5) for ending in ("", ".idx")}
    assert names == {*shards, "manifest.json", "dropped.jsonl", "tokenizer"}


def test_manifest_counts_sizes_and_hashes_are_those_of_the_files(built):
    manifest = Manifest.read(built)
    assert [shard.num_samples for shard in manifest.shards] == [5, 5, 5, 5, 4]
    assert manifest.num_samples == 24 and manifest.has_text and manifest.has_category
    assert len(manifest.categories) == 24 and manifest.builder["seed"] == 0 and not manifest.dropped
    for shard in manifest.shards:
        assert sha256_file(built / shard.name) == shard.sha256
        assert (built / shard.name).stat().st_size == shard.num_bytes


def test_samples_are_adjacent_image_first_with_nothing_of_the_machine_in_the_headers(built):
    with tarfile.open(built / "000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    endings = [member.name.partition(".")[2] for member in members]
    assert endings == ["jpg", "txt", "cls", "mask.png", "json"] * 5


def test_the_index_cuts_the_shard_into_samples(built):
    path = built / "000001.tar"
    offsets = read_index(path)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    starts = [
        m.offset for m in members if m.name.rpartition(".")[2] in IMAGE_EXTENSIONS and "mask" not in m.name
    ]
    last = members[-1]
    assert offsets.tolist() == [*starts, last.offset_data + -(-last.size // 512) * 512]


# webdataset leaves closing its files to the garbage collector: https://github.com/webdataset/webdataset
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning"
)
def test_webdataset_itself_reads_the_shards(built):
    urls = [str(path) for path in sorted(built.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(samples) == 24
    for sample in samples:
        assert sample["jpg"].size == tuple(sample["json"]["size"]) == sample["mask.png"].size
        assert sample["txt"] == sample["json"]["captions"][0]
        assert sample["json"]["category"] == Manifest.read(built).categories[sample["cls"]]
        assert set(sample["json"]["objects"][0]) >= {"name", "shape", "color", "texture", "box"}
    gc.collect()


def test_a_complete_data_set_is_left_alone_and_said_to_be_complete(tmp_path, capsys):
    command = ["build", "scenes", "--count", "6", "--size", "32", "--heldout", "0", "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "d")]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}
    assert main([*command, "--out", str(tmp_path / "d")]) == 0
    assert "complete already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")} == before


def test_other_settings_into_the_same_folder_are_refused_with_the_difference(built):
    other = replace(SCENES, seed=1).collections()[0]
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 asked.*another --out"):
        build(other, built, OPTIONS)


def test_a_folder_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.doc.*another --out"):
        build(_collection(), tmp_path, OPTIONS)


def _slow_scene(index: int, make, seconds: float) -> Made:
    import time

    time.sleep(seconds)
    return make(index)


KILLED = """
import functools, sys
from data_prep.build import Options, build
from tests.data_prep.test_build import OPTIONS, SCENES, _slow_scene
from dataclasses import replace
from pathlib import Path
collection = SCENES.collections()[0]
if __name__ == "__main__":
    slow = replace(collection, make=functools.partial(_slow_scene, make=collection.make, seconds=0.15))
    build(slow, Path(sys.argv[1]), replace(OPTIONS, workers=int(sys.argv[2])))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(built, tmp_path, workers):
    folder, script = tmp_path / "d", tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(workers)], env=environment, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (folder / ".build" / "000001.json").exists():
        os.sched_yield()
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "manifest.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert 1 <= len(finished) < 5
    build(_collection(), folder, OPTIONS)
    assert _contents(folder) == _contents(built)
    kept = [name for name, time in finished.items() if (folder / name).stat().st_mtime_ns == time]
    assert len(kept) >= 1, "finished shards must be reused"


@pytest.mark.parametrize("name", ["000000.tar", "000000.tar.idx"])
def test_a_finished_shard_that_was_damaged_meanwhile_is_built_again(name, built, tmp_path, monkeypatch):
    folder = tmp_path / "d"
    _interrupt(folder, monkeypatch, after=12)
    path = folder / name
    time = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(time, time + (name == "000000.tar")))
    build(_collection(), folder, OPTIONS)
    assert _contents(folder) == _contents(built)


def _interrupt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException | None = None
) -> None:
    """Build until `after` samples were written, then raise inside the shard."""
    count = 0
    blocks = shard_module._blocks

    def failing(*arguments):
        nonlocal count
        count += 1
        if count > after:
            raise error or KeyboardInterrupt
        return blocks(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shard_module, "_blocks", failing)
        with pytest.raises(type(error) if error else KeyboardInterrupt):
            build(_collection(), folder, OPTIONS)


def test_no_space_left_leaves_no_half_shard_and_the_next_run_goes_on(built, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "d"
    _interrupt(folder, monkeypatch, after=12, error=OSError(errno.ENOSPC, "No space left on device"))
    assert sorted(path.name for path in folder.glob("*.t*")) == [
        "000000.tar",
        "000000.tar.idx",
        "000001.tar",
        "000001.tar.idx",
    ]
    build(_collection(), folder, OPTIONS)
    assert _contents(folder) == _contents(built)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 KiB; skips where it cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("a small tmpfs needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_stops_with_a_remedy_and_no_half_shard(small_disk, capfd):
    collection = replace(_collection(), num_bytes=0)  # so that the estimate lets it begin
    with pytest.raises(OSError, match=r"no space left in .*run the same command again"):
        build(collection, small_disk / "d", replace(OPTIONS, shard_size=15))
    for path in (small_disk / "d").glob("*.tar"):  # whatever has a final name is whole
        with tarfile.open(path) as tar:
            assert len({member.name.partition(".")[0] for member in tar}) == len(read_index(path)) - 1
    assert not list((small_disk / "d").glob("*.tar.*.tmp"))


def test_too_little_space_is_said_before_the_first_shard(tmp_path):
    greedy = replace(_collection(), num_bytes=1 << 60)
    with pytest.raises(OSError, match=r"MiB free, 24 items need about .* choose another --out"):
        build(greedy, tmp_path / "d", OPTIONS)
    assert not list((tmp_path / "d").glob("*.tar"))


def _sometimes_bad(index: int, make, bad: frozenset[int]) -> Made:
    return Made(None, (Dropped(f"input {index}", "corrupt"),)) if index in bad else make(index)


def test_too_many_bad_inputs_stop_the_build_and_a_higher_limit_goes_on(tmp_path, capsys):
    collection = _collection()
    bad = replace(collection, make=partial(_sometimes_bad, make=collection.make, bad=frozenset({1, 2})))
    folder = tmp_path / "d"
    with pytest.raises(ValueError, match=r"2 of 24 inputs.*'corrupt': 2.*max_bad=0.05.*--max-bad"):
        build(bad, folder, replace(OPTIONS, max_bad=0.05))
    assert not (folder / "manifest.json").exists()
    names = [json.loads(line)["name"] for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert names == ["input 1", "input 2"]
    assert build(bad, folder, replace(OPTIONS, max_bad=0.1))
    assert Manifest.read(folder).dropped == {"corrupt": 2} and Manifest.read(folder).num_samples == 22


def test_a_shard_without_a_single_good_input_is_left_out(tmp_path):
    collection = _collection()
    bad = replace(collection, make=partial(_sometimes_bad, make=collection.make, bad=frozenset(range(5, 10))))
    build(bad, tmp_path / "d", replace(OPTIONS, max_bad=1.0))
    manifest = Manifest.read(tmp_path / "d")
    assert "000001.tar" not in [shard.name for shard in manifest.shards] and manifest.num_samples == 19
    assert manifest.num_items == 24 and sum(manifest.dropped.values()) == 5
    assert sum(shard.num_items for shard in manifest.shards) == 19 and check(tmp_path / "d") == manifest


def test_every_shard_counts_its_items_and_what_was_left_out_by_reason(tmp_path):
    collection = _collection()
    bad = replace(collection, make=partial(_sometimes_bad, make=collection.make, bad=frozenset({0, 7, 8})))
    build(bad, tmp_path / "d", replace(OPTIONS, max_bad=1.0))
    manifest = Manifest.read(tmp_path / "d")
    (reason,) = manifest.dropped
    told = [(shard.num_items, shard.num_samples, dict(shard.dropped)) for shard in manifest.shards]
    assert told[:3] == [(5, 4, {reason: 1}), (5, 3, {reason: 2}), (5, 5, {})]
    assert manifest.num_items == 24 == manifest.num_samples + counts_by_reason(manifest)[reason]


def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path, monkeypatch):
    collection = _collection()
    deadly = replace(collection, make=partial(kills_itself, make=collection.make))
    monkeypatch.setattr(local, "MAX_DEATHS", 2)
    with pytest.raises(OSError, match=r"worker was killed.*same command again"):
        build(deadly, tmp_path / "d", replace(OPTIONS, workers=2))


@pytest.mark.parametrize("arguments", [["scenes"], ["scenes", "--out", "x", "--heldout", "1.5"], ["nothing"]])
def test_wrong_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["build", *arguments])
    assert stopped.value.code == 2


def test_a_missing_data_set_ends_with_code_1_and_a_remedy(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nothing")]) == 1
    assert "nothing is no folder: name a data set" in capsys.readouterr().err
    assert main(["check", str(tmp_path)]) == 1
    assert "run the same `data_prep build` again" in capsys.readouterr().err
