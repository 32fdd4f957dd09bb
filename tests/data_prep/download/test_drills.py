"""What survives when something is killed, fills up or never ends? No row is lost, none is doubled."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data_prep.download.runs as running
import data_prep.download.watch as watching
from data_prep.build import Options, build
from data_prep.download import downloaded
from data_prep.download.watch import DISK, ENDED, LATE, MEMORY, STALLED, Allowed, resident, watch
from data_prep.places import Place
from data_prep.plan import shard_ranges
from data_prep.samples import Collection
from data_prep.schema import Manifest
from tests.data_prep.download.lists import Rows, describe, quick, rows_of
from tests.data_prep.download.misbehaving import Server, picture, serving

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def server() -> Iterator[Server]:
    """A server with a trap."""
    with serving() as server:
        yield server


def _collection(rows: Rows, work: Path, **options: object) -> Collection:
    """With `ahead`, what a builder is about to make is here already."""
    collection = _unprepared(rows, work, **options)
    if collection.prepare is not None:
        collection.prepare(shard_ranges(collection, 1))
    return collection


def _unprepared(rows: Rows, work: Path, **options: object) -> Collection:
    return downloaded(rows, work, quick(**options), describe, name="urls", split="train", settings={})


def _outcomes(collection: Collection) -> list[tuple[str, bytes | None, str]]:
    return [(item.row.key, item.content, item.reason) for item in collection.items[:]]


def _urls(server: Server, count: int, trap: int | None = None) -> list[str]:
    return [
        f"{server.url}/trap" if number == trap else f"{server.url}/good/{number}" for number in range(count)
    ]


def _engines(work: Path) -> list[int]:
    """Process numbers of the engines that work in this folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"data_prep.download.engine" in command and str(work).encode() in command:
            found.append(int(entry.name))
    return found


def _group_of(leader: int) -> list[int]:
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(entry.name)) == leader != int(entry.name):
                members.append(int(entry.name))
        except ProcessLookupError:
            continue
    return members


def _once(spring: Callable[[], None]) -> Callable[[], None]:
    sprung: list[bool] = []

    def trap() -> None:
        if not sprung:
            sprung.append(True)
            spring()

    return trap


def test_killed_workers_of_a_pool_cost_a_rerun_and_not_a_row(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"

    def kill_workers() -> None:
        for leader in _engines(work):
            for worker in _group_of(leader):
                os.kill(worker, signal.SIGKILL)

    server.trap = _once(kill_workers)
    rows = rows_of(tmp_path / "rows", _urls(server, 12, trap=1))
    collection = _collection(rows, work, raw_shard_size=4, ahead=True, processes=2)
    assert "run 1 of 3 stalled" in capsys.readouterr().err  # img2dataset itself would wait for ever
    outcomes = _outcomes(collection)
    assert [content for _, content, _ in outcomes[2:]] == [picture(number) for number in range(2, 12)]
    assert not any(reason for _, _, reason in outcomes)


def test_a_row_that_kills_the_engine_every_time_is_quarantined_alone(server: Server, tmp_path: Path) -> None:
    work = tmp_path / "work"
    server.trap = lambda: [os.kill(engine, signal.SIGKILL) for engine in _engines(work)]
    rows = rows_of(tmp_path / "rows", _urls(server, 6, trap=2))
    collection = _collection(rows, work, raw_shard_size=6, reruns=0, threads=1)
    made = [collection.make(item) for item in collection.items[:]]
    assert [one.sample.key if one.sample else one.dropped[0].reason for one in made] == [
        *("r-0", "r-1", "quarantined", "r-3", "r-4", "r-5")
    ]


def test_after_a_kill_of_the_supervisor_its_engine_dies_and_a_new_one_goes_on(
    server: Server, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    rows = rows_of(tmp_path / "rows", _urls(server, 12, trap=9))
    ended: list[int] = []
    supervisor = subprocess.Popen(
        [sys.executable, "-c", _SUPERVISOR, str(tmp_path), str(len(rows.parts))],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LIST": repr([(part.name, part.num_rows, part.sha256) for part in rows.parts])},
    )

    def kill_supervisor() -> None:
        ended.extend(os.pidfd_open(engine) for engine in _engines(work))
        supervisor.kill()

    server.trap = _once(kill_supervisor)
    assert supervisor.wait(60) == -signal.SIGKILL
    assert len(ended) == 1 and select.select(ended, [], [], 20)[0], "the engine outlives its supervisor"
    os.close(ended[0])
    collection = _collection(rows, work, raw_shard_size=4, ahead=True)
    assert [content for _, content, _ in _outcomes(collection)][:9] == [picture(n) for n in range(9)]
    assert all(server.visits[f"/good/{number}"] == 1 for number in range(8)), (
        "a finished shard was downloaded again"
    )


_SUPERVISOR = """
import os, sys
from pathlib import Path
from data_prep.download import downloaded
from tests.data_prep.download.lists import Part, Rows, describe, quick
folder = Path(sys.argv[1])
rows = Rows(folder / "rows", tuple(Part(*part) for part in eval(os.environ["LIST"])))
options = quick(raw_shard_size=4, ahead=True)
collection = downloaded(rows, folder / "work", options, describe, name="urls", split="train", settings={})
collection.prepare([range(start, start + 4) for start in range(0, 12, 4)])
"""


def test_a_full_disk_is_an_error_and_the_same_command_goes_on(
    server: Server, small_disk: Path, tmp_path: Path
) -> None:
    rows = rows_of(tmp_path / "rows", _urls(server, 100))
    with pytest.raises(OSError, match="no space left") as caught:
        _collection(rows, small_disk / "work", raw_shard_size=100, ahead=True)
    assert caught.value.errno == errno.ENOSPC
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    outcomes = _outcomes(_collection(rows, small_disk / "work", raw_shard_size=100, ahead=True))
    assert [content for _, content, _ in outcomes] == [picture(number) for number in range(100)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 150 KiB; skips where it cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small tmpfs needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_space_that_must_stay_free_is_asked_for_before_anything_starts(
    server: Server, tmp_path: Path
) -> None:
    rows = rows_of(tmp_path / "rows", _urls(server, 2))
    with pytest.raises(OSError, match="min_free") as caught:
        _collection(rows, tmp_path / "work", ahead=True, min_free=2**60)
    assert caught.value.errno == errno.ENOSPC
    assert not server.visits


def test_an_outage_stops_the_build_instead_of_dropping_the_data(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows", [f"http://127.0.0.1:1/{number}" for number in range(20)])
    with pytest.raises(ConnectionError, match=r"outage=0\.5"):
        _collection(rows, tmp_path / "work", ahead=True, reruns=0, retries=0)


def test_shards_are_the_same_whether_downloaded_ahead_or_by_the_workers_and_leave_no_raw_tar(
    server: Server, tmp_path: Path
) -> None:
    urls = [*_urls(server, 10), f"{server.url}/missing", f"{server.url}/turned"]
    rows = rows_of(tmp_path / "rows", urls)
    options = Options(shard_size=4, max_bad=0.5, vocab_size=64)
    manifests = []
    for name, ahead in (("ahead", True), ("demand", False)):
        collection = _unprepared(rows, tmp_path / f"work-{name}", raw_shard_size=4, ahead=ahead)
        build(collection, tmp_path / name, options)
        manifests.append(Manifest.read(tmp_path / name))
        left = {path.name for path in (tmp_path / f"work-{name}").rglob("*") if path.is_file()}
        assert not any(name.endswith((".tar", ".parquet")) for name in left)
        assert Counter(path.endswith(".json") for path in left)[True] == 4  # three markers, and the settings
    assert manifests[0] == manifests[1]
    assert manifests[0].num_samples == 11 and manifests[0].dropped == {"http_404": 1}


def test_raw_files_that_were_lost_or_cut_are_downloaded_again(server: Server, tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows", _urls(server, 4))
    collection = _collection(rows, tmp_path / "work", raw_shard_size=2, ahead=True, keep_raw=True)
    first, second = sorted((tmp_path / "work").glob("runs/*/out/*.tar"))
    first.unlink()
    second.chmod(0o644)
    second.write_bytes(second.read_bytes()[:700])
    assert [content for _, content, _ in _outcomes(collection)] == [picture(number) for number in range(4)]
    assert set(server.visits.values()) == {2}


def test_two_that_want_the_same_shard_download_it_once(server: Server, tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows", _urls(server, 6))
    collection = _collection(rows, tmp_path / "work", raw_shard_size=6, keep_raw=True)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(_outcomes, [collection, collection])
    assert first == second and [content for _, content, _ in first] == [
        picture(number) for number in range(6)
    ]
    assert set(server.visits.values()) == {1}


def test_a_trial_of_a_few_rows_downloads_no_more_than_those(server: Server, tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows", _urls(server, 12))
    items = _collection(rows, tmp_path / "work", raw_shard_size=12).items[3:5]
    for _ in range(2):  # the second time from disk
        assert [item.content for item in items] == [picture(3), picture(4)]
    assert server.visits.total() == 2
    items.release()
    assert not list((tmp_path / "work" / "runs").iterdir())


@pytest.mark.parametrize("limit", [0, 6])
def test_a_store_that_fails_costs_no_download(
    limit: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tmp_path / "rows", _urls(server, 8))
    options = Options(workers=1, vocab_size=64, limit=limit)
    real, num_calls = Place.move, Counter()

    def move(place: Place, name: str, path: Path) -> None:
        num_calls[name] += 1
        if num_calls[name] == 1:
            raise OSError("the store has failed for 300 seconds")
        real(place, name, path)

    monkeypatch.setattr(Place, "move", move)
    for _ in range(2):  # one for each of two shards
        with pytest.raises(OSError, match="the store has failed"):
            build(_collection(rows, tmp_path / "work", raw_shard_size=4), tmp_path / "out", options)
    assert build(_collection(rows, tmp_path / "work", raw_shard_size=4), tmp_path / "out", options)
    assert Manifest.read(tmp_path / "out").num_samples == (limit or 8)
    assert server.visits.total() == (limit or 8)
    assert not list((tmp_path / "work").rglob("*.tar"))


def test_raw_files_of_a_builder_that_died_after_a_shard_was_stored_are_removed_by_the_next(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tmp_path / "rows", _urls(server, 4))
    options = Options(workers=1, vocab_size=64)

    def die(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.shard.release", die)
    with pytest.raises(KeyboardInterrupt):
        build(_collection(rows, tmp_path / "work", raw_shard_size=4), tmp_path / "out", options)
    assert len(list((tmp_path / "work").rglob("*.tar"))) == 1
    assert build(_collection(rows, tmp_path / "work", raw_shard_size=4), tmp_path / "out", options)
    assert server.visits.total() == 4 and not list((tmp_path / "work").rglob("*.tar"))


@pytest.mark.parametrize("count", [1, 3])
def test_an_engine_that_cannot_start_is_an_error_and_no_quarantine(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "COMMAND", ("sh", "-c", "echo no module named cv2; exit 1"))
    rows = rows_of(tmp_path / "rows", [f"http://127.0.0.1:1/{number}" for number in range(count)])
    with pytest.raises(ChildProcessError, match="no module named cv2"):
        _collection(rows, tmp_path / "work", ahead=True)


def test_a_run_that_takes_too_much_memory_goes_on_with_half_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def hungry(job: Path, *_: object) -> str:
        threads.append(json.loads(job.read_text())["threads"])
        return MEMORY

    monkeypatch.setattr(running, "watch", hungry)
    rows = rows_of(tmp_path / "rows", ["http://127.0.0.1:1/0"])
    with pytest.raises(ChildProcessError):
        _collection(rows, tmp_path / "work", ahead=True, threads=8, reruns=2)
    assert threads == [8, 4, 2, 1]  # the last in pieces


# -- the watchdog alone, on processes that are no engine --
ENDLESS = "sleep 60 & exec sleep 60"
PLENTY = Allowed(stall=60, seconds=60, memory=2**40, min_free=0)


@pytest.mark.parametrize(
    ("allowed", "verdict"),
    [
        (Allowed(0.2, 60, 2**40, 0), STALLED),
        (Allowed(60, 0.2, 2**40, 0), LATE),
        (Allowed(60, 60, 1, 0), MEMORY),
        (Allowed(60, 60, 2**40, 2**62), DISK),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_run_that_must_end_is_killed_with_everything_it_started(
    allowed: Allowed, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LOOK", 0.05)
    monkeypatch.setattr(watching, "START", 0.0)
    monkeypatch.setattr(watching, "COMMAND", ("sh", "-c", ENDLESS))
    groups: list[int] = []
    kill = watching._kill
    monkeypatch.setattr(watching, "_kill", lambda group: (groups.append(group), kill(group)))
    assert watch(tmp_path / "job.json", tmp_path, allowed, lambda rows: None) == verdict
    assert len(groups) == 1 and not any(resident(groups[0]))


def test_a_run_that_ends_says_so_whatever_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "COMMAND", ("sh", "-c", "exit 3"))
    assert watch(tmp_path / "job.json", tmp_path, PLENTY, lambda rows: None) == ENDED


def test_progress_of_rows_keeps_a_run_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LOOK", 0.05)
    (tmp_path / watching.ROWS_DONE).mkdir()
    steps = f"for i in 1 2 3 4 5 6 7 8; do printf . >> {tmp_path}/{watching.ROWS_DONE}/1; sleep 0.2; done"
    monkeypatch.setattr(watching, "COMMAND", ("sh", "-c", steps))
    seen: list[int] = []
    assert watch(tmp_path / "job.json", tmp_path, Allowed(0.8, 60, 2**40, 0), seen.append) == ENDED
    assert seen[-1] == 8
