"""Do copies of shards make room on a disk that is smaller than their data set?"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from data_prep.schema import Shard
from pretrain.config import Mixing, Source
from pretrain.data import cache, open_shards, remote
from pretrain.data.cache import MARGIN, Cache, cache_folder, lock_of
from pretrain.data.faults import DataError
from pretrain.data.remote import RemoteFolder
from pretrain.data.shards import ShardFolder
from tests.data.delivered import assert_same, batches
from tests.data.sets import encoded, good_set, sample, small_run, write_set

SIZES = (4,) * 6


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3I_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    monkeypatch.setattr(cache, "LATE", 60.0)
    monkeypatch.setattr(open_shards, "LOOK", 60.0)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[], ShardFolder]]:
    folder, made = good_set(tmp_path / "many", SIZES), []

    def another() -> ShardFolder:
        made.append(ShardFolder(f"file://{folder}"))
        return made[-1]

    yield another
    for one in made:
        one.close()


def taken() -> int:
    """Bytes of all copies, removed ones that are read still among them."""
    return sum(
        512 * path.stat().st_blocks for path in (cache_folder() / "shards").glob("*") if path.suffix != ".idx"
    )


def disk_of(num_shards: int, folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> int:
    """A disk that takes so many of the shards; how many bytes."""
    size = num_shards * (-(-max(shard.num_bytes for shard in folder.manifest.shards) // 4096) * 4096)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: Mock(free=size + MARGIN - taken()))
    return size


def test_copies_stay_within_the_free_space_and_what_was_used_longest_ago_goes(
    opened: Callable[[], ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened()
    size = disk_of(3, folder, monkeypatch)
    for index in range(0, 24, 4):
        assert folder.sample(index) == sample(index)
        assert taken() <= size
    kept = {path.stem for path in (cache_folder() / "shards").glob("*.tar")}
    assert kept == {shard.sha256 for shard in folder.manifest.shards[3:]}


def test_what_others_read_of_a_removed_copy_is_waited_for_and_nothing_else_goes_meanwhile(
    opened: Callable[[], ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = opened(), opened()
    disk_of(2, reader, monkeypatch)
    assert [reader.sample(index) for index in (0, 4)] == [sample(0), sample(4)]
    with pytest.raises(
        DataError, match=r"has room for 0 GiB, a shard takes .*name a larger one by M3I_CACHE"
    ):
        writer.sample(8)
    names = {path.name for path in (cache_folder() / "shards").glob("*")}
    shards = reader.manifest.shards
    assert f"{shards[0].sha256}.tar" not in names and f"{shards[1].sha256}.tar" in names
    assert reader.sample(1) == sample(1)  # it is read to the last
    reader._files.close_removed()
    assert writer.sample(8) == sample(8) and reader.sample(5) == sample(5)
    assert not list((cache_folder() / "shards").glob("*.going"))


def test_locks_that_ask_for_a_file_open_for_writing_make_room_too(
    opened: Callable[[], ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def of_nfs(file: int, kind: int) -> None:
        is_read_only = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if kind & fcntl.LOCK_EX and is_read_only:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(file, kind)

    monkeypatch.setattr(cache.fcntl, "flock", of_nfs)
    monkeypatch.setattr(open_shards, "LOOK", 0.01)
    reader, writer = opened(), opened()
    disk_of(2, reader, monkeypatch)
    assert reader.sample(0) == sample(0)
    for index in (4, 8, 12):
        assert writer.sample(index) == sample(index)


def test_readers_that_rest_give_back_what_was_removed(
    opened: Callable[[], ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another source of the process that waits for room, and workers whose batches nobody takes yet."""
    monkeypatch.setattr(open_shards, "LOOK", 0.01)
    reader, writer = opened(), opened()
    disk_of(2, reader, monkeypatch)
    assert [reader.sample(index) for index in (0, 4)] == [sample(0), sample(4)]
    for index in (8, 12, 16):
        assert writer.sample(index) == sample(index)
    assert reader.sample(1) == sample(1)


def test_a_reader_that_waits_for_the_copy_of_another_gives_back_what_was_removed(
    opened: Callable[[], ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_shards, "LOOK", 0.01)
    reader, writer = opened(), opened()
    disk_of(1, reader, monkeypatch)
    reader.sample(0)
    waits = threading.Thread(target=reader.sample, args=(8,))
    with writer._remote.cache.locked(lock_of(writer.manifest.shards[2].sha256)):  # another process copies it
        waits.start()
        assert writer.sample(4) == sample(4)
    writer.close()
    waits.join()


def test_readers_that_do_not_move_on_cost_another_copy_and_not_the_run(
    opened: Callable[[], ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = opened(), opened()
    disk_of(2, reader, monkeypatch)
    reader.sample(0)
    writer.sample(4)
    writer.close()
    with pytest.raises(DataError, match="has room for 0 GiB"):
        writer.sample(8)
    assert len(list((cache_folder() / "shards").glob("*.tar"))) == 1
    monkeypatch.setattr(cache, "LATE", 0.0)
    assert writer.sample(8) == sample(8)


def test_a_full_disk_that_tells_free_space_makes_room_and_only_an_empty_cache_ends_the_run(
    opened: Callable[[], ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = opened(), RemoteFolder._copy_pieces
    limit = 3 * max(shard.num_bytes for shard in folder.manifest.shards) + 3 * 4096

    def pieces(self: RemoteFolder, shard: Shard, partial: Path) -> str:
        found = real(self, shard, partial)
        if taken() > limit:  # as a quota
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return found

    monkeypatch.setattr(RemoteFolder, "_copy_pieces", pieces)
    for index in range(0, 24, 4):
        assert folder.sample(index) == sample(index)
    limit = 0
    with pytest.raises(DataError, match=r"shards is full \(.*quota.*make room there or lower M3I_CACHE_GIB"):
        folder.sample(0)
    assert not list((cache_folder() / "shards").glob("*.tar"))


@pytest.mark.parametrize(
    ("where", "what", "error"),
    [
        (Cache, "reserve", cache.Full("no room")),
        (RemoteFolder, "_copy_pieces", OSError(errno.ENOSPC, "no room")),
    ],
)
def test_who_waits_for_room_gives_up_once_it_is_closed(
    opened: Callable[[], ShardFolder],
    monkeypatch: pytest.MonkeyPatch,
    where: type,
    what: str,
    error: Exception,
) -> None:
    asked = Mock(side_effect=error)
    monkeypatch.setattr(where, what, asked)
    folder = opened()
    folder.close()
    with pytest.raises(DataError, match="no room"):
        folder.sample(0)
    assert asked.call_count == 1


def test_room_that_the_start_counts_leaves_the_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: Mock(free=MARGIN + 4096))
    Cache(tmp_path / "cache", 2**30).require_room(4096)
    with pytest.raises(ValueError, match=r"has room for .* name a larger disk by M3I_CACHE"):
        Cache(tmp_path / "cache", 2**30).require_room(4097)


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 3 MiB for copies; skips where it cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs needs the right to mount")
    monkeypatch.setenv("M3I_CACHE", str(folder / "cache"))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def noisy(number: int) -> dict[str, bytes]:
    """A sample of 64 kB."""
    image = np.random.default_rng(number).integers(0, 256, (146, 146, 3), np.uint8)
    return {"png": encoded(image, "PNG"), "cls": b"0"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_larger_than_the_disk_is_passed_twice(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 60.0)
    folder = write_set(tmp_path / "large", [[noisy(4 * s + n) for n in range(4)] for s in range(16)])
    run = small_run(data={"large": Source("category")}, batch=4, mixing=Mixing(window=1))
    here = batches(run, {"large": folder}, 32)
    for one, other in zip(
        here, batches(run, {"large": f"file://{folder}"}, 32, workers=workers), strict=True
    ):
        assert_same(one, other)
