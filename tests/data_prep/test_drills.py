"""Does a build survive being killed, refused, full or doubled, on disk and on S3? With the same bytes, or an error.

Every drill ends with a comparison to the bytes of an undisturbed build, so no sample can be lost or doubled and no
manifest can lie.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from data_prep import build as build_module
from data_prep import claim, stores
from data_prep.__main__ import main
from data_prep.build import build, build_part, finish, work_folder
from data_prep.claim import claimed
from data_prep.places import Place, place_of
from data_prep.plan import WHOLE, Part, part_of
from data_prep.shard import finished_shards
from tests.data.s3 import BUCKET, Store, s3_store
from tests.data_prep.disturbed import (
    OPTIONS,
    collection,
    fails_the_store,
    kills_itself_once,
    raises_at,
    steals_the_claim,
)
from tests.data_prep.rclone import rclone_server
from tests.paths import ROOT

ALL_METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")


def _contents(place: Place, below: str = "") -> dict[str, bytes]:
    """Every file by its relative name."""
    files = {below + name: place.read(name) for name in place.names()}
    for folder in place.folders():
        files |= _contents(place.child(folder), f"{below}{folder}/")
    return files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = place_of(tmp_path_factory.mktemp("undisturbed") / "set")
    assert build(collection(), place, OPTIONS)
    return _contents(place)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with s3_store() as opened, pytest.MonkeyPatch.context() as patch:
        for name, value in {**opened.environment, "AWS_MAX_ATTEMPTS": "1"}.items():  # no retries but ours
            patch.setenv(name, value)
        patch.setattr(claim, "SETTLE", 0.01)
        patch.setattr(claim, "STALE", 0.4)
        yield opened


@pytest.fixture
def s3(store, request) -> Iterator[Place]:
    yield place_of(f"s3://{BUCKET}/{request.node.name.partition('[')[0]}")
    store.faults.refused, store.faults.methods = 0.0, ("GET", "HEAD")


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path) -> Place:
    return request.getfixturevalue("s3") if request.param == "s3" else place_of(tmp_path / "set")


def _at_last(place: Place, undisturbed: dict[str, bytes]) -> None:
    """The same command once more gives the undisturbed data set, and nothing else is left."""
    build(collection(), place, OPTIONS)
    assert _contents(place) == undisturbed


def test_a_store_that_refuses_a_quarter_of_all_requests_gets_the_same_bytes(s3, store, undisturbed):
    store.faults.refused, store.faults.methods = 0.25, ALL_METHODS
    before = store.faults.num_refused
    assert build(collection(), s3, OPTIONS)
    store.faults.refused = 0.0
    assert _contents(s3) == undisturbed and store.faults.num_refused > before + 5


def test_a_server_with_keys_gets_the_same_bytes_from_two_workers(
    tmp_path, free_port, monkeypatch, undisturbed
):
    with rclone_server(tmp_path / "server", free_port) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        assert build(collection(), "s3://bucket/set", replace(OPTIONS, workers=2))
        assert _contents(place_of(server.folder / "set")) == undisturbed


def test_a_store_that_fails_in_the_middle_is_told_and_the_next_run_goes_on(
    s3, store, undisturbed, monkeypatch
):
    monkeypatch.setattr(stores, "PATIENCE", 0.1)
    failing = replace(
        collection(), make=partial(fails_the_store, make=collection().make, faults=store.faults)
    )
    with pytest.raises(OSError, match=r"has failed for .* run the same command again"):
        build(failing, s3, OPTIONS)
    store.faults.refused = 0.0
    assert not s3.exists("manifest.json")
    before = s3.listed()
    assert "000000.tar" in before and "000002.tar" not in before
    _at_last(s3, undisturbed)


SLOW = """
import functools, sys
from dataclasses import replace
from data_prep.build import build
from tests.data_prep.disturbed import OPTIONS, collection, slow
if __name__ == "__main__":
    late = replace(collection(), make=functools.partial(slow, make=collection().make, seconds=float(sys.argv[3])))
    build(late, sys.argv[1], replace(OPTIONS, workers=int(sys.argv[2])))
"""


def _builder(
    place: Place, tmp_path: Path, workers: int = 1, seconds: float = 0.03
) -> subprocess.Popen[bytes]:
    script = tmp_path / "builder.py"
    script.write_text(SLOW)
    return subprocess.Popen(
        [sys.executable, str(script), str(place), str(workers), str(seconds)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )


def _killed_at(process: subprocess.Popen[bytes], place: Place, num_shards: int, seconds: float) -> None:
    """SIGKILL so many seconds after so many shards were finished."""
    patience = 0.02
    while process.poll() is None:
        if place.exists(".build/settings.json") and len(place.names("*.tar")) >= num_shards:
            patience = seconds
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            if patience == seconds:
                process.kill()
                break
    process.communicate()


def test_a_builder_killed_at_random_moments_ends_with_the_same_bytes(place, undisturbed, tmp_path):
    moments = random.Random(5)
    for workers in (1, 2) if place.local else (1,):
        _killed_at(
            _builder(place, tmp_path, workers), place, moments.randrange(1, 4), moments.uniform(0, 0.15)
        )
        assert not place.exists("manifest.json") or set(undisturbed) <= set(_contents(place))
        for name in place.names("*.tar"):  # whatever has a final name is whole
            assert place.read(name) == undisturbed[name]
    _at_last(place, undisturbed)


def test_a_builder_that_is_told_to_end_says_how_to_go_on_and_the_next_does(tmp_path):
    command = [sys.executable, "-m", "data_prep", "build", "scenes", "--count", "400", "--heldout", "0"]
    command += ["--shard-size", "4", "--workers", "1", "--out", str(tmp_path / "set")]
    place = place_of(tmp_path / "set" / "train")
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not place.names("*.tar"):
            time.sleep(0.01)
        process.terminate()
        told = process.communicate()[1].decode()
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in told
    assert "SIGTERM: ends when" in told and "run the same command again, a build goes on after" in told
    kept = place.names("*.tar")
    assert kept and not place.exists("manifest.json")
    assert set(finished_shards(place, range(100))) >= set(range(len(kept) - 1))


def test_a_worker_that_is_killed_is_replaced(tmp_path, undisturbed, capfd):
    make = partial(kills_itself_once, make=collection().make, mark=tmp_path / "died")
    assert build(replace(collection(), make=make), tmp_path / "set", replace(OPTIONS, workers=2))
    assert (tmp_path / "died").exists() and _contents(place_of(tmp_path / "set")) == undisturbed
    assert "18/18" in capfd.readouterr().err  # nothing is counted twice


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 60 KiB; skips where it cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_that_gets_room_ends_with_the_same_bytes(small_disk, undisturbed):
    greedy = replace(collection(), num_bytes=0)  # so that the estimate lets it begin
    place = place_of(small_disk / "set")
    with pytest.raises(OSError, match=r"no space left in .*run the same command again"):
        build(greedy, place, OPTIONS)
    assert not place.exists("manifest.json")
    for name in place.names("*.tar"):
        assert place.read(name) == undisturbed[name]
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    _at_last(place, undisturbed)


def test_a_full_disk_where_shards_are_made_is_named(small_disk, s3, undisturbed):
    greedy = replace(collection(), num_bytes=0)
    with pytest.raises(OSError, match=rf"no space left in {small_disk}.* where shards for {s3} are made"):
        build(greedy, s3, replace(OPTIONS, shard_size=18, work=str(small_disk)))
    assert s3.names() == [] and not list(small_disk.rglob("*.tmp"))


def test_another_shard_size_is_refused_on_resume(place, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE", 0.1)
    broken = replace(collection(), make=partial(raises_at, make=collection().make, number=9))
    with pytest.raises(RuntimeError):
        build(broken, place, OPTIONS)
    before = place.listed()
    with pytest.raises(ValueError, match=r"shard_size: 4 there, 5 asked.*another --out"):
        build(collection(), place, replace(OPTIONS, shard_size=5))
    assert place.listed() == before and len(before) == 4


def test_a_second_builder_is_refused_while_the_first_lives(place, undisturbed, monkeypatch):
    monkeypatch.setattr(claim, "BEAT", 0.05)
    elsewhere = "another machine"  # as that of a process on a cluster
    monkeypatch.setattr(claim, "_machine", lambda: elsewhere)
    build_part(collection(), place, replace(OPTIONS, part="1/5"))  # so that there is something to guard
    with claimed(place) as require:
        for options in (OPTIONS, replace(OPTIONS, part="2/5")):
            with pytest.raises(FileExistsError, match=r"is being written by .*: wait until it ends"):
                (build_part if options.part else build)(collection(), place, options)
        require()
    _at_last(place, undisturbed)


def test_a_builder_whose_files_another_sweeps_writes_them_again(tmp_path, undisturbed, monkeypatch):
    place, link = place_of(tmp_path / "set"), os.link
    sweeps = [place.local / ".build"]

    def late(source, target):
        if sweeps:
            shutil.rmtree(sweeps.pop())
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert build(collection(), place, OPTIONS) and not sweeps
    _at_last(place, undisturbed)


def test_a_builder_that_another_one_overtakes_finds_all_done(tmp_path, undisturbed, monkeypatch):
    place, read = place_of(tmp_path / "set"), Place.read
    others = [partial(build, collection(), place, OPTIONS)]

    def late(self, name):
        if name.endswith("settings.json") and others:
            others.pop()()
        return read(self, name)

    monkeypatch.setattr(Place, "read", late)
    assert not build(collection(), place, OPTIONS) and not others
    _at_last(place, undisturbed)


def test_two_builders_at_once_make_one_data_set(place, undisturbed, tmp_path):
    both = [_builder(place, tmp_path, seconds=0.02) for _ in range(2)]
    told = [process.communicate()[1].decode() for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes and _contents(place) == undisturbed
    for code, text in zip(codes, told, strict=True):
        assert code == 0 or "FileExistsError" in text  # or it came when all was done


def test_a_claim_without_a_sign_of_life_is_taken_over_and_its_owner_stops(s3, monkeypatch, capfd):
    monkeypatch.setattr(claim, "BEAT", 0.05)
    s3.write(".build/claim", json.dumps({"owner": "x", "machine": "far", "host": "far", "pid": 1}).encode())
    with claimed(s3) as require:
        assert "claimed by process 1 on far" in capfd.readouterr().err
        s3.write(".build/claim", json.dumps({"owner": "y"}).encode())
        until = time.monotonic() + 20
        with pytest.raises(OSError, match="was taken over by another process"):
            while time.monotonic() < until:
                require()
                os.sched_yield()
    assert json.loads(s3.read(".build/claim"))["owner"] == "y"  # left to whom it belongs


@pytest.mark.parametrize("workers", [1, 2])
def test_a_builder_that_lost_its_claim_puts_no_shard_any_more(s3, monkeypatch, workers):
    s3 = s3.child(str(workers))
    thief = partial(steals_the_claim, place=str(s3), make=collection().make, number=9)
    with pytest.raises(OSError, match="was taken over by another process"):
        build(replace(collection(), make=thief), s3, replace(OPTIONS, workers=workers))
    assert "000002.tar" not in s3.names() and not s3.exists("manifest.json")
    assert json.loads(s3.read(".build/claim"))["owner"] == "y"


def test_a_shard_that_another_builder_wrote_since_is_in_no_manifest(place, undisturbed, monkeypatch):
    def late(*arguments):  # the last look before the manifest is taken after a stale builder's last shard
        place.write("000001.tar", place.read("000001.tar")[:-1] + b"x")
        return changed(*arguments)

    changed = build_module.changed_shards
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "changed_shards", late)
        with pytest.raises(OSError, match=r"shards \[1\] are no longer .*run the same command again"):
            build(collection(), place, OPTIONS)
    assert not place.exists("manifest.json")
    _at_last(place, undisturbed)


def test_parts_of_different_counts_cannot_share_a_data_set(place, undisturbed):
    build_part(collection(), place, replace(OPTIONS, part="1/2"))
    with pytest.raises(ValueError, match=r"was begun in 2 parts, 1/3 is one of 3: pass --part I/2"):
        build_part(collection(), place, replace(OPTIONS, part="1/3"))
    build_part(collection(), place, replace(OPTIONS, part="2/2"))
    _at_last(place, undisturbed)


def test_a_claim_of_a_process_that_is_gone_is_taken_over_at_once(s3, monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    record = {"owner": "x", "machine": claim._machine(), "host": "here", "pid": gone.pid}
    s3.write(".build/claim", json.dumps(record).encode())
    monkeypatch.setattr(claim, "STALE", 1000.0)
    with claimed(s3):
        assert s3.child(".build").names() == ["claim"]


def test_parts_in_any_order_make_the_same_data_set(place, undisturbed):
    command = ["build", "scenes", "--count", "18", "--heldout", "0", "--size", "32", "--shard-size", "4"]
    command += ["--workers", "1", "--out", str(place)]
    place = place.child("train")
    for part in ("3/3", "1/3", "1/3"):
        assert main([*command, "--part", part]) == 0
        assert not place.exists("manifest.json")
    with pytest.raises(
        FileNotFoundError, match=r"lacks 2 of 5 shards, the first is number 1: build its part"
    ):
        finish(collection(), place, OPTIONS)
    assert main([*command, "--part", "2/3"]) == 0
    assert _contents(place) == undisturbed and not work_folder(place, OPTIONS).parent.exists()
    assert main([*command, "--part", "2/3"]) == 0 and _contents(place) == undisturbed


def test_parts_at_once_make_the_same_data_set(tmp_path, undisturbed):
    command = [sys.executable, "-m", "data_prep", "build", "scenes", "--count", "18", "--heldout", "0"]
    command += ["--size", "32", "--shard-size", "4", "--workers", "1", "--part", "slurm", "--out"]
    slurm = {"SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_STEP": "2"}
    tasks = [
        subprocess.Popen(
            [*command, str(tmp_path / "d")],
            cwd=ROOT,
            env={**os.environ, **slurm, "SLURM_ARRAY_TASK_ID": task},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for task in ("4", "6")
    ]
    assert [task.wait(60) for task in tasks] == [0, 0]
    assert _contents(place_of(tmp_path / "d" / "train")) == undisturbed


def test_a_part_is_said_as_one_of_many_or_by_slurm(monkeypatch):
    assert part_of("") == WHOLE and part_of("3/16") == Part(2, 16)
    assert [Part(1, 3).owns(shard) for shard in range(4)] == [False, True, False, False]
    for wrong in ("0/3", "4/3", "a", "1/", "-1/3"):
        with pytest.raises(ValueError, match="must be I/N with 1 <= I <= N"):
            part_of(wrong)
    with pytest.raises(ValueError, match=r"needs SLURM_ARRAY_TASK_ID.*--array"):
        part_of("slurm")
