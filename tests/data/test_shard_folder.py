"""Does a data set folder give the bytes that were put in, and name what is broken?"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.index import index_path
from pretrain.data import verified
from pretrain.data.faults import BadSample, DataError
from pretrain.data.shards import ShardFolder
from tests.data.sets import good_set, sample, write_set


def test_every_sample_comes_back_byte_for_byte(tmp_path: Path) -> None:
    folder = ShardFolder(good_set(tmp_path / "set", (3, 1, 4)))
    folder.verify(range(3))
    assert len(folder) == 8 and folder.shard_sizes == [3, 1, 4]
    for index in range(8):
        assert folder.sample(index) == sample(index)
    assert [folder.key(index) for index in (0, 3, 7)] == ["000000_000000", "000001_000000", "000002_000003"]
    folder.close()


def test_members_of_any_size_are_read(tmp_path: Path) -> None:
    samples = [
        {"jpg": b"x" * size, "mask.png": b"", "json": bytes(size)} for size in (0, 1, 511, 512, 513, 5000)
    ]
    folder = ShardFolder(write_set(tmp_path / "set", [samples]))
    assert [folder.sample(index) for index in range(6)] == samples


def test_more_shards_than_open_files_are_read(tmp_path: Path) -> None:
    folder = ShardFolder(good_set(tmp_path / "set", (1, 1, 1, 1)), open_shards=2)
    for index in (0, 1, 2, 3, 0, 2):
        assert folder.sample(index) == sample(index)
    assert len(folder._files._open) == 2
    folder.close()


def test_a_shard_without_an_index_gets_the_builders_one(tmp_path: Path) -> None:
    root = good_set(tmp_path / "set")
    index = index_path(root / "000001.tar")
    built = index.read_bytes()
    index.unlink()
    folder = ShardFolder(root)
    assert [folder.sample(number) for number in range(len(folder))] == [sample(n) for n in range(len(folder))]
    assert index.read_bytes() == built and not list(root.glob(".*"))


def test_an_index_that_may_not_be_written_is_made_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only file system")

    root = good_set(tmp_path / "set")
    index_path(root / "000000.tar").unlink()
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert ShardFolder(root).sample(0) == sample(0)
    assert not index_path(root / "000000.tar").exists()


def test_what_cannot_be_indexed_is_told_by_its_byte(tmp_path: Path) -> None:
    root = good_set(tmp_path / "set")
    index_path(root / "000000.tar").unlink()
    folder = ShardFolder(root)
    content = bytearray((root / "000000.tar").read_bytes())
    content[100:110] = b"nonsense!!"
    (root / "000000.tar").write_bytes(content)
    with pytest.raises(BadSample, match=r"has no index and cannot get one: byte 0: the header of") as caught:
        folder.sample(0)
    assert caught.value.reason == "broken_index"


@pytest.mark.parametrize("end", [2**33, 2**45, 2**62, 2**63 + 512])
def test_an_index_that_leads_beyond_its_shard_is_refused(tmp_path: Path, end: int) -> None:
    root = good_set(tmp_path / "set")
    index = index_path(root / "000000.tar")
    index.write_bytes(index.read_bytes()[:-8] + end.to_bytes(8, "little"))
    with pytest.raises(
        BadSample, match=rf"ends its samples at byte {end}, the manifest's shard at"
    ) as caught:
        ShardFolder(root).sample(0)
    assert caught.value.reason == "broken_index"


@pytest.mark.parametrize(
    "broken",
    [
        lambda content: b"",
        lambda content: content[:-3],
        lambda content: content[:-8],
        lambda content: content[8:],
        lambda content: content[:-8] + (2**33).to_bytes(8, "little"),
    ],
)
def test_a_broken_index_is_told_with_its_remedy_which_mends_it(
    tmp_path: Path, broken: Callable[[bytes], bytes]
) -> None:
    root = good_set(tmp_path / "set")
    index = index_path(root / "000000.tar")
    whole = index.read_bytes()
    index.write_bytes(broken(whole))
    with pytest.raises(BadSample, match=r"remove that \.idx, the next start makes it anew$"):
        ShardFolder(root).sample(0)
    index.unlink()
    assert ShardFolder(root).sample(0) == sample(0) and index.read_bytes() == whole


def test_samples_that_the_manifest_does_not_count_are_no_fault_of_an_index(tmp_path: Path) -> None:
    root = good_set(tmp_path / "set", (3,))
    index_path(root / "000000.tar").unlink()
    manifest = root / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_samples": 3', '"num_samples": 2'))
    with pytest.raises(BadSample, match="2 samples need one more: copy that shard again"):
        ShardFolder(root).sample(0)


def test_a_shard_that_is_cut_off_gets_no_index_that_outlives_its_mending(tmp_path: Path) -> None:
    root = good_set(tmp_path / "set", (6, 6))
    index_path(root / "000001.tar").unlink()
    folder = ShardFolder(root)
    content = (root / "000001.tar").read_bytes()
    for kept in (len(content) // 1024 * 512, len(content) // 2048 * 512 + 100):
        (root / "000001.tar").write_bytes(content[:kept])
        with pytest.raises(BadSample):
            folder.sample(6)
        with pytest.raises(BadSample):
            folder.sample(7)  # told again, without another look
    (root / "000001.tar").write_bytes(content)
    assert ShardFolder(root).sample(6) == sample(6)


def test_too_many_open_files_are_no_fault_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ShardFolder(good_set(tmp_path / "set"))

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("pretrain.data.shards.os.open", refuse)
    with pytest.raises(
        DataError, match=r"Too many open files: raise the limit .`ulimit -n`. or lower mixing.window"
    ):
        folder.sample(0)
    monkeypatch.undo()


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest.json is missing.*data_prep build"):
        ShardFolder(tmp_path)


@pytest.mark.parametrize("change", ["missing", "truncated", "longer"])
def test_a_shard_unlike_its_manifest_is_named_at_start(tmp_path: Path, change: str) -> None:
    folder = good_set(tmp_path / "set")
    shard = folder / "000001.tar"
    content = shard.read_bytes()
    if change == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content[:-512] if change == "truncated" else content + bytes(512))
    with pytest.raises((FileNotFoundError, ValueError), match=r"000001.tar (is missing|has \d+ bytes)"):
        ShardFolder(folder)


def test_verify_finds_one_changed_bit(tmp_path: Path) -> None:
    folder = good_set(tmp_path / "set")
    content = bytearray((folder / "000002.tar").read_bytes())
    content[700] ^= 4
    (folder / "000002.tar").write_bytes(content)
    ShardFolder(folder).verify(range(2))
    with pytest.raises(ValueError, match=r"000002.tar has sha256 .*the manifest says"):
        ShardFolder(folder).verify(range(3))


def test_a_shard_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    real = verified._sha256
    monkeypatch.setattr(
        verified, "_sha256", lambda path, *rest: hashed.append(path.name) or real(path, *rest)
    )
    folder = good_set(tmp_path / "set")
    ShardFolder(folder).verify(range(3))
    ShardFolder(folder).verify(range(3))
    assert hashed == ["000000.tar", "000001.tar", "000002.tar"]
    content = (folder / "000001.tar").read_bytes()
    (folder / "000001.tar").write_bytes(content[:1500] + b"?" + content[1501:])
    with pytest.raises(ValueError, match=r"000001.tar has sha256"):
        ShardFolder(folder).verify(range(3))
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"000001.tar has sha256"):  # another place, nothing is known of it
        ShardFolder(tmp_path / "copy").verify(range(3))
    assert hashed[3:] == ["000001.tar", "000000.tar", "000001.tar"]


def test_without_a_place_to_remember_shards_are_hashed_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    real = verified._sha256
    monkeypatch.setattr(
        verified, "_sha256", lambda path, *rest: hashed.append(path.name) or real(path, *rest)
    )
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M3I_CACHE", str(tmp_path / "file" / "cache"))
    folder = ShardFolder(good_set(tmp_path / "set"))
    for _ in range(2):
        folder.verify(range(3))
    assert len(hashed) == 6


def test_a_slow_check_takes_its_time_and_ends_when_told(tmp_path: Path) -> None:
    folder = good_set(tmp_path / "set")
    manifest = ShardFolder(folder).manifest
    before = threading.enumerate()
    verifier = verified.Verifier([(folder, "set", shard) for shard in manifest.shards], bytes_a_second=1e-3)
    (thread,) = [thread for thread in threading.enumerate() if thread not in before]
    verifier.close()
    thread.join(timeout=10)
    assert not thread.is_alive() and not verifier.changed


def test_a_shard_truncated_later_gives_a_reason(tmp_path: Path) -> None:
    folder = ShardFolder(good_set(tmp_path / "set", (3,)))
    content = (folder.folder / "000000.tar").read_bytes()
    (folder.folder / "000000.tar").write_bytes(content[:1000])
    with pytest.raises(BadSample, match=r"000000.tar ended") as caught:
        folder.sample(2)
    assert caught.value.reason == "truncated_shard"


def test_an_index_that_does_not_fit_the_manifest_gives_a_reason(tmp_path: Path) -> None:
    folder = ShardFolder(good_set(tmp_path / "set", (3,)))
    index = index_path(folder.folder / "000000.tar")
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(BadSample, match="holds 3 offsets") as caught:
        folder.sample(0)
    assert caught.value.reason == "broken_index"


@pytest.mark.parametrize("num_lost", [1, 2])  # members, of a block and a header each
def test_an_index_that_ends_before_its_shard_does_is_refused(tmp_path: Path, num_lost: int) -> None:
    folder = ShardFolder(good_set(tmp_path / "set", (3,)))
    index = index_path(folder.folder / "000000.tar")
    end = int.from_bytes(index.read_bytes()[-8:], "little") - num_lost * 1024
    index.write_bytes(index.read_bytes()[:-8] + end.to_bytes(8, "little"))
    with pytest.raises(
        BadSample, match=rf"at byte {end}, where the shard has another member: remove"
    ) as caught:
        folder.sample(2)
    assert caught.value.reason == "broken_index"


def test_a_shard_whose_end_cannot_be_read_gives_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ShardFolder(good_set(tmp_path / "set", (3,)))
    end = int.from_bytes(index_path(folder.folder / "000000.tar").read_bytes()[-8:], "little")
    real = os.pread

    def damaged(descriptor: int, size: int, at: int) -> bytes:
        if at >= end:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, size, at)

    monkeypatch.setattr(os, "pread", damaged)
    assert [folder.sample(number) for number in range(3)] == [sample(number) for number in range(3)]


@pytest.mark.parametrize("at", [3, 130, 150, 257])  # name, size, checksum, magic
def test_a_damaged_header_gives_a_reason(tmp_path: Path, at: int) -> None:
    folder = ShardFolder(good_set(tmp_path / "set", (2,)))
    content = bytearray((folder.folder / "000000.tar").read_bytes())
    content[at] ^= 1
    (folder.folder / "000000.tar").write_bytes(content)
    with pytest.raises(BadSample) as caught:
        folder.sample(0)
    assert caught.value.reason == "broken_record"
    assert folder.sample(1) == sample(1)
