"""What does a rank get while the file system of its shards fails, for a moment, for good, or in one place?"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from data_prep.index import index_path, read_index
from pretrain import retries
from pretrain.config import Source
from pretrain.data import open_shards, shards
from pretrain.data.cache import cache_folder
from pretrain.data.faults import BadSample, DataError
from pretrain.data.loader import Loader
from pretrain.data.records import read_members
from pretrain.data.shards import ShardFolder
from tests.data.delivered import assert_same, batches, joined
from tests.data.sets import good_set, sample, small_run

RUN = small_run(data={"names": Source("category")}, max_bad=0.5)
REAL_OPEN, REAL_PREAD = os.open, os.pread


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hundredths of a second stand for minutes."""
    monkeypatch.setenv("M3I_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "FIRST_PAUSE", 1e-3)
    monkeypatch.setattr(open_shards, "PATIENCE", 0.2)
    monkeypatch.setattr(open_shards, "DAMAGED_FOR", 0.02)
    monkeypatch.setattr(shards, "PATIENCE_AT_START", 0.2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return good_set(tmp_path / "names", (6, 6, 6), has_text=False)


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


Fault = Callable[
    [Path, int, int], None
]  # file, first and last byte that are read; raises what it does to them


def break_reads(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Reads of shards fail as `fault` says, as Linux does it: what lies before a damaged place comes first."""

    def pread(descriptor: int, size: int, start: int) -> bytes:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        for end in (start + size, start + 1):
            try:
                fault(path, start, end)
                return REAL_PREAD(descriptor, end - start, start)
            except OSError as error:
                failed = error
        raise failed

    monkeypatch.setattr(os, "pread", pread)


def damage(shard: str, place: int) -> Fault:
    """One byte of a shard cannot be read."""

    def fault(path: Path, start: int, end: int) -> None:
        if path.name == shard and start <= place < end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return fault


def fail_now_and_then(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Of the first opening of each shard, and of its third reading, the first two attempts fail; what did is given."""
    failed: list[str] = []

    def fail(what: str) -> None:
        if failed.count(what) < 2:
            failed.append(what)
            raise OSError(number, os.strerror(number))

    def opened(path: str | os.PathLike[str], *arguments: object, **options: object) -> int:
        if str(path).endswith(".tar"):
            fail(f"open {Path(path).name}")
        return REAL_OPEN(path, *arguments, **options)

    reads: dict[str, int] = {}

    def pread(descriptor: int, size: int, start: int) -> bytes:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        reads[name] = reads.get(name, 0) + 1
        if reads[name] > 2:
            fail(f"read {name}")
        return REAL_PREAD(descriptor, size, start)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pread", pread)
    return failed


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ESHUTDOWN])
def test_a_file_system_that_fails_for_a_moment_costs_time_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calm = batches(RUN, {"names": folder}, 6)
    for start in (0, 3):  # and at a resume
        failed = fail_now_and_then(monkeypatch, number)
        loader = Loader(RUN, {"names": folder}, None, rank=0, world=1, start_step=start)
        for expected in calm[start:]:
            assert_same(next(loader), expected)
        assert not loader.dropped and len(failed) == 2 * 2 * 3
        loader.close()
        monkeypatch.undo()


def test_a_file_system_that_stays_away_ends_the_run_and_a_restart_is_exact(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = batches(RUN, {"names": folder}, 6)
    log = tmp_path / "dropped.jsonl"
    loader = Loader(RUN, {"names": folder}, None, rank=0, world=1, dropped_to=log)
    assert_same(next(loader), calm[0])

    def away(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pread", away)
        with pytest.raises(
            DataError,
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
    with pytest.raises(DataError, match=r"names has no manifest.json any more: is it mounted\?"):
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


def test_a_damaged_place_costs_its_sample_alone_on_every_world(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = batches(RUN, {"names": folder}, 9)
    place = read_index(folder / "000001.tar")[4] + 700  # in the middle of a sample
    break_reads(monkeypatch, damage("000001.tar", place))
    delivered = {}
    for world in (1, 2, 4):
        loaders = [Loader(RUN, {"names": folder}, None, rank=rank, world=world) for rank in range(world)]
        delivered[world] = [
            joined(parts) for parts in zip(*(islice_of(one, 9) for one in loaders), strict=True)
        ]
        counts = [count for one in loaders for count in one.dropped.items()]
        assert {kind for kind, _ in counts} == {"names: unreadable"} and sum(
            n for _, n in counts
        ) == 4  # passes
        for one in loaders:
            one.close()
    for parts in zip(*delivered.values(), strict=True):
        for other in parts[1:]:
            assert_same(parts[0], other)
    for resumed, expected in zip(
        batches(RUN, {"names": folder}, 4, start_step=5), delivered[1][5:], strict=True
    ):
        assert_same(resumed, expected)
    whole, damaged = joined(calm), joined(delivered[1])
    assert (
        sum((one != other).any().item() for one, other in zip(whole.views, damaged.views, strict=True)) == 4
    )


def islice_of(loader: Loader, num: int) -> list:
    return [next(loader) for _ in range(num)]


def test_a_damaged_place_is_waited_for_once_in_a_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ShardFolder(folder)
    break_reads(monkeypatch, damage("000000.tar", 600))
    for wait in (0.02, 3600.0):
        monkeypatch.setattr(open_shards, "DAMAGED_FOR", wait)
        with pytest.raises(
            BadSample, match=r"000000.tar, sample 0: .*Input/output error; others can be read"
        ):
            opened.sample(0)
    monkeypatch.undo()
    assert opened.sample(0) == sample(0, has_text=False)  # the disk has mended it


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
    break_reads(monkeypatch, damage("000001.tar", place))
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

    def fault(path: Path, start: int, end: int) -> None:
        if path.exists() and path.stat().st_ino == damaged:
            raise OSError(errno.EIO, "Input/output error")

    kept = os.open(copy, os.O_RDONLY)  # its place on the disk is not taken again
    break_reads(monkeypatch, fault)
    assert opened.sample(1) == sample(1, has_text=False)
    opened.close()
    os.close(kept)


def test_what_a_rank_may_not_read_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ShardFolder(folder)

    def refuse(*_: object) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(DataError, match=r"000000.tar may not be read: .*Permission denied; mend the access"):
        opened.sample(0)


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
    assert not list(opened.changed(range(3)))  # at a resume its sample tells
    with pytest.raises(DataError, match=r"000000.tar has failed for 0.2 seconds.*copy it again"):
        opened.verify(range(3))


def header_of(size: bytes) -> bytes:
    """A tar header with the right checksum."""
    header = bytearray(512)
    header[:10], header[124:136], header[156:157], header[257:262] = b"000_00.jpg", size, b"0", b"ustar"
    header[148:156] = b"%06o\0 " % (sum(header) + 8 * ord(" "))
    return bytes(header)


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
