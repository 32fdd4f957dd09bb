"""What does a rank get while the file system of its shards fails, for a moment, for good, or in one place?"""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from data_prep.index import index_bytes, index_path, read_index
from data_prep.schema import Shard
from pretrain import retries
from pretrain.config import Source
from pretrain.data import open_shards, shards
from pretrain.data.batch import Batch
from pretrain.data.cache import PARTIAL, Cache, cache_folder
from pretrain.data.faults import BadSample, DataAway, DataError
from pretrain.data.loader import Loader
from pretrain.data.records import read_members
from pretrain.data.remote import RemoteFolder
from pretrain.data.shards import ShardFolder
from pretrain.data.store import Store
from tests.data.delivered import assert_same, batches, joined
from tests.data.sets import good_set, sample, small_run

RUN = small_run(data={"names": Source("category")}, max_bad=0.2)  # less than a shard of three
REAL_OPEN, REAL_PREAD = os.open, os.pread


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Attempts follow each other soon."""
    monkeypatch.setenv("M3I_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "FIRST_PAUSE", 1e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return good_set(tmp_path / "names", (6, 6, 6), has_text=False)


@pytest.fixture
def calm(folder: Path) -> list[Batch]:
    """What the run gives on whole disks."""
    return batches(RUN, {"names": folder}, 6)


@pytest.fixture
def within_seconds() -> Iterator[None]:
    """What would go on for ever ends by TimeoutError."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def damage(monkeypatch: pytest.MonkeyPatch, places_of: Callable[[Path], range]) -> None:
    """These bytes of a file can never be read; as Linux does it, what lies before them comes first."""

    def pread(descriptor: int, size: int, start: int) -> bytes:
        places = places_of(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        if start < places.start:
            size = min(size, places.start - start)
        elif start < places.stop:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return REAL_PREAD(descriptor, size, start)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(open_shards, "DAMAGED_FOR", 0.0)


def one_place(shard: str, place: int) -> Callable[[Path], range]:
    return lambda path: range(place, place + 1) if path.name == shard else range(0)


def fail_now_and_then(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Two attempts to open a shard for the first time, and two of its third reading, fail; they are listed.

    A descriptor that has failed never works again, as that of a file that another server now has."""
    failed: list[str] = []
    stale: set[int] = set()

    def fail(what: str) -> None:
        if failed.count(what) < 2:
            failed.append(what)
            raise OSError(number, os.strerror(number))

    def opened(path: str | os.PathLike[str], *arguments: object, **options: object) -> int:
        if str(path).endswith(".tar"):
            fail(f"open {Path(path).name}")
        descriptor = REAL_OPEN(path, *arguments, **options)
        stale.discard(descriptor)
        return descriptor

    reads: dict[str, int] = {}

    def pread(descriptor: int, size: int, start: int) -> bytes:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        reads[name] = reads.get(name, 0) + 1
        if descriptor in stale:
            raise OSError(number, os.strerror(number))
        if reads[name] > 2 and failed.count(f"read {name}") < 2:
            stale.add(descriptor)
            fail(f"read {name}")
        return REAL_PREAD(descriptor, size, start)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(open_shards, "PATIENCE", 20.0)
    return failed


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ESHUTDOWN])
def test_a_file_system_that_fails_for_a_moment_costs_time_and_nothing_else(
    folder: Path, calm: list[Batch], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for start in (0, 3):  # and at a resume
        with monkeypatch.context() as broken:
            failed = fail_now_and_then(broken, number)
            loader = Loader(RUN, {"names": folder}, None, rank=0, world=1, start_step=start)
            for expected in calm[start:]:
                assert_same(next(loader), expected)
            assert not loader.dropped and len(failed) == 2 * 2 * 3
            loader.close()


def test_a_file_system_that_stays_away_ends_the_run_and_a_restart_is_exact(
    folder: Path, tmp_path: Path, calm: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "dropped.jsonl"
    loader = Loader(RUN, {"names": folder}, None, rank=0, world=1, dropped_to=log)
    assert_same(next(loader), calm[0])

    def away(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pread", away)
        broken.setattr(open_shards, "PATIENCE", 0.2)
        broken.setattr(open_shards, "DAMAGED_FOR", 0.0)
        with pytest.raises(
            DataAway,
            match=r"0000\d\d.tar has failed for 0.2 seconds.*start again when it can be read, or copy it again",
        ):
            list(loader)
        assert not any(one["key"] for one in loader.samples(range(8)))  # told at once
    assert not loader.dropped and not log.read_text()
    loader.close()
    for resumed, expected in zip(batches(RUN, {"names": folder}, 5, start_step=1), calm[1:], strict=True):
        assert_same(resumed, expected)


def test_a_folder_that_is_not_mounted_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, away = ShardFolder(folder), folder.with_name("away")
    folder.rename(away)
    told = pytest.raises(DataAway, match=r"names has no manifest.json any more: is it mounted\?")
    with told, monkeypatch.context() as hurried:
        hurried.setattr(open_shards, "PATIENCE", 0.1)
        opened.sample(0)
    tried = []

    def mounted(path: object, *arguments: object, **options: object) -> int:
        tried.append(path)
        if len(tried) == 3:
            away.rename(folder)
        return REAL_OPEN(path, *arguments, **options)

    monkeypatch.setattr(os, "open", mounted)
    assert opened.sample(0) == sample(0, has_text=False)
    (folder / "000001.tar").unlink()
    with pytest.raises(BadSample) as caught:
        opened.sample(6)
    assert caught.value.reason == "missing_shard"


NO_FILES: dict[str, Callable[[Path], None]] = {  # what is said of it
    "000000.tar is a folder, not a file": Path.mkdir,
    "000000.tar is a pipe, not a file": os.mkfifo,
    "symbolic links.*000000.tar": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("told", NO_FILES)
def test_what_is_no_file_any_more_is_a_missing_shard(folder: Path, told: str, within_seconds: None) -> None:
    opened, shard = ShardFolder(folder), folder / "000000.tar"
    shard.unlink()
    NO_FILES[told](shard)
    with pytest.raises(BadSample, match=told) as caught:
        opened.sample(0)
    assert caught.value.reason == "missing_shard"


@pytest.mark.parametrize("told", list(NO_FILES)[:2])
def test_what_is_no_file_is_told_at_the_start(folder: Path, told: str) -> None:
    (folder / "000000.tar").unlink()
    NO_FILES[told](folder / "000000.tar")
    with pytest.raises(FileNotFoundError, match=f"{told}, the manifest names it: copy it again"):
        ShardFolder(folder)


def test_a_folder_in_place_of_an_index_costs_no_sample(folder: Path) -> None:
    opened, index = ShardFolder(folder), index_path(folder / "000000.tar")
    index.unlink()
    index.mkdir()
    assert [opened.sample(number) for number in range(6)] == [sample(n, has_text=False) for n in range(6)]
    assert index.is_dir() and not list(folder.glob(".*"))


def test_a_shard_that_is_deleted_while_it_is_open_is_missing_from_then_on(folder: Path) -> None:
    """As for a start that goes on from there, which cannot open it."""
    opened = ShardFolder(folder)
    opened.sample(0)
    (folder / "000000.tar").unlink()
    with pytest.raises(BadSample) as caught:
        opened.sample(1)
    assert caught.value.reason == "missing_shard"


def test_of_a_shard_that_is_replaced_while_it_is_open_the_new_file_is_read(folder: Path) -> None:
    opened, shard = ShardFolder(folder), folder / "000000.tar"
    before = opened.sample(0)
    (folder / "new").write_bytes(shard.read_bytes().replace(before["jpg"], bytes(len(before["jpg"]))))
    (folder / "new").replace(shard)
    assert opened.sample(0) == before | {"jpg": bytes(len(before["jpg"]))}


def test_a_damaged_place_costs_its_sample_alone_on_every_world(
    folder: Path, calm: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = read_index(folder / "000001.tar")[4] + 700  # in the middle of a sample
    damage(monkeypatch, one_place("000001.tar", place))

    def delivered(world: int, start: int, num: int) -> tuple[list[Batch], dict[str, int]]:
        ranks, dropped = [], Counter()
        for rank in range(world):
            loader = Loader(RUN, {"names": folder}, None, rank=rank, world=world, start_step=start)
            ranks.append(list(islice(loader, num)))
            dropped.update(loader.dropped)
            loader.close()
        return [joined(parts) for parts in zip(*ranks, strict=True)], dict(dropped)

    alone, dropped = delivered(1, 0, 6)
    assert dropped == {"names: unreadable": 3}  # in as many passes
    whole, damaged = joined(calm), joined(alone)
    assert (
        sum((one != other).any().item() for one, other in zip(whole.views, damaged.views, strict=True)) == 3
    )
    others, dropped = delivered(4, 2, 4)  # resumed on more ranks
    for one, other in zip(alone[2:], others, strict=True):
        assert_same(one, other)
    assert dropped.keys() == {"names: unreadable"}


def test_a_damaged_place_is_waited_for_once_in_a_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ShardFolder(folder)
    damage(monkeypatch, one_place("000000.tar", 600))
    monkeypatch.setattr(open_shards, "PATIENCE", 1.0)
    for wait in (0.0, 3600.0):
        monkeypatch.setattr(open_shards, "DAMAGED_FOR", wait)
        with pytest.raises(
            BadSample, match=r"000000.tar, sample 0: .*Input/output error; others can be read"
        ):
            opened.sample(0)
    monkeypatch.undo()
    assert opened.sample(0) == sample(0, has_text=False)  # the disk has mended it


def test_another_damaged_place_of_a_shard_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ShardFolder(folder)
    monkeypatch.setattr(open_shards, "PATIENCE", 1.0)
    for wait, sample_number in ((0.0, 0), (3600.0, 1)):
        start, _ = opened_range(folder, sample_number)
        with monkeypatch.context() as broken:
            damage(broken, one_place("000000.tar", start + 600))
            broken.setattr(open_shards, "DAMAGED_FOR", wait)
            with pytest.raises(BadSample, match=f"000000.tar, sample {sample_number}: .*others can be read"):
                opened.sample(sample_number)


def opened_range(folder: Path, number: int) -> tuple[int, int]:
    """First byte of a sample of the first shard, and the first behind it."""
    opened = ShardFolder(folder)
    opened.sample(0)
    _, offsets = opened._files._open[0]
    return offsets[number], offsets[number + 1]


def test_what_worked_long_before_it_failed_is_asked_again() -> None:
    attempts = []

    def work() -> int:
        attempts.append(len(attempts))
        if len(attempts) == 1:
            time.sleep(0.3)
            raise OSError(errno.EIO, "Input/output error")
        return 7

    assert retries.patiently(work, "a file", 0.2) == 7 and len(attempts) == 2


def test_a_pause_does_not_outlast_the_time_that_a_store_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 20.0)
    attempts: list[float] = []

    def work() -> None:
        attempts.append(time.monotonic())
        raise OSError(errno.EIO, "Input/output error")

    state = random.getstate()
    with pytest.raises(retries.GaveUp, match=r"has failed for 0.2 seconds"):
        retries.patiently(work, "a file", 0.2)
    assert random.getstate() == state  # a thread that asks a store changes nothing that another one draws
    assert 0.2 <= attempts[-1] - attempts[0] < 10 and len(attempts) > 1


def test_where_an_index_cannot_be_read_the_headers_tell_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_path(folder / "000001.tar")
    index.write_bytes(b"kept")
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path == index:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    opened = ShardFolder(folder)
    assert [opened.sample(number) for number in range(6, 12)] == [
        sample(number, has_text=False) for number in range(6, 12)
    ]
    monkeypatch.undo()
    assert index.read_bytes() == b"kept"


def test_a_shard_without_an_index_and_with_a_damaged_header_is_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = read_index(folder / "000001.tar")[4]
    index_path(folder / "000001.tar").unlink()
    opened = ShardFolder(folder)
    damage(monkeypatch, one_place("000001.tar", place))
    for number in (6, 11):
        with pytest.raises(
            BadSample, match=r"has no index and cannot get one: .*Input/output error"
        ) as caught:
            opened.sample(number)
        assert caught.value.reason == "broken_index"


def test_a_damaged_copy_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ShardFolder(f"file://{folder}")
    assert opened.sample(0) == sample(0, has_text=False)
    (copy,) = (cache_folder() / "shards").glob("*.tar")
    damaged = copy.stat().st_ino

    kept = os.open(copy, os.O_RDONLY)  # its place on the disk is not taken again
    damage(
        monkeypatch,
        lambda path: (
            range(copy.stat().st_size) if path.exists() and path.stat().st_ino == damaged else range(0)
        ),
    )
    assert opened.sample(1) == sample(1, has_text=False)
    opened.close()
    os.close(kept)


def test_a_damaged_index_of_a_copy_is_made_again(folder: Path) -> None:
    for content in (b"", index_bytes([0, 512, 1024])):
        opened = ShardFolder(f"file://{folder}")
        assert opened.sample(0) == sample(0, has_text=False)
        opened.close()
        (copy,) = (cache_folder() / "shards").glob("*.tar")
        whole = index_path(copy).read_bytes()
        index_path(copy).write_bytes(content)
        opened = ShardFolder(f"file://{folder}")
        assert opened.sample(1) == sample(1, has_text=False)
        opened.close()
        assert index_path(copy).read_bytes() == whole


def test_two_processes_never_write_an_index_by_one_temporary_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of two containers of a machine have the same host and process number."""
    real, names = Path.write_bytes, []
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: names.append(path) or real(path, content))
    for _ in range(2):
        index_path(folder / "000000.tar").unlink()
        assert ShardFolder(folder).sample(0) == sample(0, has_text=False)
    assert len(set(names)) == 2


def test_a_cache_that_is_emptied_while_a_shard_is_copied_costs_another_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, emptied = RemoteFolder._copy_pieces, []

    def copy(self: RemoteFolder, *arguments: Any) -> str:
        found = real(self, *arguments)
        if not emptied:
            emptied.append(shutil.rmtree(cache_folder()))
        return found

    monkeypatch.setattr(RemoteFolder, "_copy_pieces", copy)
    opened = ShardFolder(f"file://{folder}")
    assert [opened.sample(number) for number in (0, 7)] == [sample(n, has_text=False) for n in (0, 7)]
    (folder / "000002.tar").unlink()
    with pytest.raises(BadSample, match=r"000002.tar is missing") as caught:
        opened.sample(12)
    assert caught.value.reason == "missing_shard"
    opened.close()


def test_what_another_process_has_begun_never_takes_the_name_of_a_whole_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The locks of a cache that is emptied go with it: two processes may copy the same shard."""
    real, begun = Store.piece, []

    def piece(self: Store, shard: Shard, start: int, end: int) -> bytes:
        if not begun:
            begun.append(Cache.of_environment())
            shutil.rmtree(cache_folder())
            begun[0].reserve(begun[0].path_of(shard).with_suffix(PARTIAL), shard.num_bytes)
        return real(self, shard, start, end)

    monkeypatch.setattr(Store, "piece", piece)
    opened = ShardFolder(f"file://{folder}")
    assert opened.sample(0) == sample(0, has_text=False)
    opened.close()


def test_what_a_rank_may_not_read_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ShardFolder(folder)

    def refuse(*_: object) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "pread", refuse)
    told = r"000000.tar may not be read: .*Permission denied; mend the access"
    with pytest.raises(DataError, match=told) as caught:
        opened.sample(0)
    assert not isinstance(caught.value, DataAway), "no other start will do"


def test_a_start_waits_for_its_file_system_and_tells_a_damaged_shard(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = Path.is_file, []

    def is_file(path: Path) -> bool:
        if path.suffix == ".tar" and len(failed) < 2:
            failed.append(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    opened = ShardFolder(folder)
    assert len(failed) == 2

    def hashed(path: Path, *_: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pretrain.data.verified._sha256", hashed)
    monkeypatch.setattr(shards, "PATIENCE_AT_START", 0.1)
    assert not list(opened.changed(range(3)))  # at a resume its sample tells
    with pytest.raises(DataError, match=r"000000.tar has failed for 0.1 seconds.*copy it again") as caught:
        opened.verify(range(3))
    assert not isinstance(caught.value, DataAway), "no other start will do"
    with monkeypatch.context() as of_all:  # the manifest is there, and of the shards nothing can be read
        of_all.setattr(os, "pread", hashed)
        with pytest.raises(DataAway, match=r"000000.tar has failed for 0.1 seconds"):
            opened.verify(range(3))
        with pytest.raises(DataAway, match=r"000000.tar has failed for 0.1 seconds"):
            list(opened.changed(range(3)))  # at a resume too: it would wait as long for each of thousands
        of_all.setattr(Path, "is_file", lambda path: path.suffix != ".tar" or hashed(path))
        with pytest.raises(DataAway, match=r"000000.tar has failed for 0.1 seconds"):
            list(opened.problems())
        of_all.setattr(Path, "open", hashed)
        with pytest.raises(DataAway, match=r"000001.tar has failed for 0.1 seconds"):
            opened.first_bytes(1, 512)
        of_all.setattr(os, "pread", REAL_PREAD)
        with pytest.raises(DataError) as caught:
            opened.first_bytes(1, 512)
        assert not isinstance(caught.value, DataAway)

    def stat(path: Path, **_: object) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(DataAway, match=r"names has failed for 0.1 seconds"):
        list(opened.problems())


def header_of(size: bytes) -> bytes:
    """A tar header with the right checksum."""
    header = bytearray(512)
    header[:10], header[124:136], header[156:157], header[257:262] = b"000_00.jpg", size, b"0", b"ustar"
    header[148:156] = b"%06o\0 " % (sum(header) + 8 * ord(" "))
    return bytes(header)


def test_a_header_with_any_other_byte_is_refused() -> None:
    name, checksum = "z" * 100, range(148, 156)  # the longest name has the largest sum
    with io.BytesIO() as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size = 5
        archive.addfile(member, io.BytesIO(b"12345"))
        record = file.getvalue()[:1024]
    assert read_members(record) == (name, {"": b"12345"})
    for place, change in itertools.product(set(range(512)) - set(checksum), (1, 127, 128, 255)):
        damaged = bytearray(record)
        damaged[place] = (damaged[place] + change) % 256
        with pytest.raises(BadSample):
            read_members(bytes(damaged))


@pytest.mark.parametrize("size", [b"-0000001000\0", b"77777777777\0", b"\x80" + bytes(10) + b"\x01"])
def test_a_header_with_an_absurd_size_is_refused(folder: Path, within_seconds: None, size: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        read_members(header_of(size) + bytes(512))
    assert caught.value.reason == "broken_record"
    index_path(folder / "000000.tar").unlink()
    with (folder / "000000.tar").open("r+b") as file:
        file.write(header_of(size))
    with pytest.raises(BadSample, match="has no index and cannot get one"):
        ShardFolder(folder).sample(0)
