"""What does a rank get where samples or whole shards are bad, and what is told of it?"""

from __future__ import annotations

import gc
import json
import pickle
import resource
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.schema import SAMPLE_BYTES, Manifest, Shard
from pretrain.config import Mixing, Run, Source
from pretrain.data.batch import Batch
from pretrain.data.drop_list import NAME, file_of, records
from pretrain.data.drops import Drops
from pretrain.data.faults import DataError, Dropped, beyond_chance, check_bad_share
from pretrain.data.loader import Loader
from pretrain.data.told import Teller
from tests.data.delivered import assert_same, batches, joined
from tests.data.sets import good_set, sample, small_run, write_set, write_tokenizer


def spoilt(tmp_path: Path, bad: dict[int, dict[str, bytes]], size: int = 200) -> Path:
    samples = [sample(n, has_text=False) for n in range(size)]
    for index, members in bad.items():
        samples[index] = members
    return write_set(tmp_path / "spoilt", [samples[: size // 2], samples[size // 2 :]])


def rounds(run: Run, folder: Path, workers: int = 0) -> Iterator[tuple[Batch, dict[str, int]]]:
    loader = Loader(run, {"spoilt": folder}, None, rank=0, world=1, workers=workers)
    for batch in loader:
        yield batch, dict(loader.dropped)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_replaced_and_counted_by_reason(tmp_path: Path, workers: int) -> None:
    good = sample(3, has_text=False)
    bad = {
        5: {**good, "jpg": good["jpg"][:-20]},
        60: {**good, "jpg": b"no image at all"},
        150: {**good, "cls": b"77"},
    }
    run = small_run(data={"spoilt": Source("category")}, batch=20, max_bad=0.05)
    log = tmp_path / "dropped.jsonl"
    loader = Loader(
        run, {"spoilt": spoilt(tmp_path, bad)}, None, rank=0, world=1, workers=workers, dropped_to=log
    )
    for batch in islice(loader, 10):  # one epoch
        assert batch.has_category.all() and batch.views[:, 0].flatten(1).any(1).all()
    assert loader.dropped == {"spoilt: truncated": 1, "spoilt: not_an_image": 1, "spoilt: bad_category": 1}
    assert loader.num_images == 200 and all(seconds > 0 for seconds in loader.seconds.values())
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(one["source"], one["shard"], one["index"], one["reason"]) for one in told} == {
        ("spoilt", "000000.tar", 5, "truncated"),
        ("spoilt", "000000.tar", 60, "not_an_image"),
        ("spoilt", "000001.tar", 50, "bad_category"),
    }
    loader.close()


def test_what_was_dropped_is_listed_once_and_counted_whatever_the_kills_and_ranks(tmp_path: Path) -> None:
    """Of two passes and a half over 200 samples."""
    broken = {**sample(0, has_text=False), "jpg": b"\xff\xd8 broken"}
    folder = spoilt(tmp_path, dict.fromkeys(range(0, 200, 10), broken))
    run = small_run(data={"spoilt": Source("category")}, batch=20, max_bad=1.0)

    def ranks(world: int, first: int, until: int) -> dict[str, int]:
        total: dict[str, int] = {}
        for rank in range(world):
            path = file_of(tmp_path, rank, world)
            loader = Loader(
                run, {"spoilt": folder}, None, rank=rank, world=world, start_step=first, dropped_to=path
            )
            list(islice(loader, until - first))
            loader.close()
            total |= {kind: total.get(kind, 0) + count for kind, count in loader.dropped.items()}
        return total

    straight = ranks(1, 0, 25)
    (tmp_path / "dropped-rank_00000.jsonl").unlink()
    assert 40 < sum(straight.values()) < 60
    ranks(2, 0, 14)  # killed, and begun again at step 11 by five ranks, at step 16 by two, at step 20 by one
    ranks(5, 11, 16)
    ranks(2, 16, 22)
    assert ranks(1, 20, 25) == straight
    assert [path.name for path in tmp_path.glob("dropped-*")] == ["dropped-rank_00000.jsonl"]
    told = list(records(tmp_path / "dropped-rank_00000.jsonl"))
    listed = [record for record in told if record.sample is not None]
    assert len(listed) == 20 == len({record.sample[:3] for record in listed})
    assert {record.step for record in listed} <= set(range(10))
    again = [record for record in told if record.sample is None]
    assert sum(sum(record.again.values()) for record in again) == sum(straight.values()) - 20
    assert {record.step for record in again} <= set(range(10, 25))
    # A start that was killed after it took over a list, and before it removed that, begins again.
    content = (tmp_path / "dropped-rank_00000.jsonl").read_bytes()
    (tmp_path / "dropped-rank_00003.jsonl").write_bytes(b"".join(content.splitlines(keepends=True)[5:9]))
    assert file_of(tmp_path, 0, 1).read_bytes() == content
    assert not (tmp_path / "dropped-rank_00003.jsonl").exists()


@pytest.mark.parametrize("worlds", [(1, 4), (1, 1), (2, 1), (1, 3, 2), (2, 4, 1)])
def test_a_list_that_was_taken_over_counts_once_whatever_ranks_come_then(
    tmp_path: Path, worlds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(4):
        drops = Drops(tmp_path / NAME.format(rank), 0, {}, rank=rank)
        drops.begin()
        for step in range(3):  # at each a sample of this rank, and one that every rank meets
            samples = [Dropped("names", "a.tar", index, "corrupt", "") for index in (rank, 9)]
            drops.add(step, samples)
        drops.close()
    with monkeypatch.context() as killed:  # it has written its own list, and has removed none

        def kill(path: Path) -> None:
            raise KeyboardInterrupt

        killed.setattr(Path, "unlink", kill)
        with pytest.raises(KeyboardInterrupt):
            file_of(tmp_path, 0, worlds[0])
    for world in worlds[1:]:
        for rank in range(world):
            file_of(tmp_path, rank, world)
    lists = [list(records(path)) for path in tmp_path.iterdir()]
    for listed in lists:
        named = [record.sample.index for record in listed if record.sample is not None]
        assert len(named) == len(set(named))
    counts = Drops(file_of(tmp_path, 0, 1), 3, {}).counts
    assert counts == {"names: corrupt": 24}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_resume_on_more_ranks_is_judged_by_what_it_reads_itself(tmp_path: Path) -> None:
    """One rank met 20 bad samples of 400, within 8 %; of twenty ranks the first would have read 20 images by then."""
    broken = {**sample(0, has_text=False), "jpg": b"\xff\xd8 broken"}
    folder = spoilt(tmp_path, dict.fromkeys(range(0, 200, 20), broken))
    run = small_run(data={"spoilt": Source("category")}, batch=40, max_bad=0.08)
    log = tmp_path / "dropped.jsonl"
    for world, first, until in ((1, 0, 10), (20, 10, 20)):
        loader = Loader(run, {"spoilt": folder}, None, rank=0, world=world, start_step=first, dropped_to=log)
        list(islice(loader, until - first))
        loader.close()
        told = sum(loader.dropped.values())
        assert told == 20 if world == 1 else told > 20  # the old ones are told on
    assert sum(sum(record.causes().values()) for record in records(log)) == told


def test_a_resume_on_data_that_became_bad_stops(tmp_path: Path) -> None:
    broken = {**sample(0, has_text=False), "jpg": b"\xff\xd8 broken"}
    folder = spoilt(tmp_path, dict.fromkeys(range(0, 200, 2), broken))
    run = small_run(data={"spoilt": Source("category")}, batch=40, max_bad=0.08)
    loader = Loader(run, {"spoilt": folder}, None, rank=0, world=1, start_step=1000)
    with pytest.raises(DataError, match=r"of the \d+ samples read so far are bad"):
        list(islice(loader, 3))
    loader.close()


def test_a_lost_shard_is_listed_once_in_little_memory(tmp_path: Path) -> None:
    """Four passes over a shard of 800 samples, of a batch of 100 each, and a resume."""
    manifest = replace(
        Manifest.read(good_set(tmp_path / "set", (1,), has_text=False)),
        num_samples=800,
        shards=(Shard("000000.tar", 800, 800 * SAMPLE_BYTES, "0" * 64),),
    )
    log, message = tmp_path / "dropped.jsonl", "a path and what the file system said of it " * 3
    lost = [Dropped("names", "000000.tar", index, "missing_shard", message) for index in range(800)]

    def opened(step: int) -> Drops:
        drops = Drops(log, step, {"names": manifest})
        drops.begin()
        return drops

    drops = opened(0)
    for step in range(32):
        first = 100 * step % 800
        drops.add(step, lost[first : first + 100])
    drops.close()
    assert drops.counts == {"names: missing_shard": 3200}
    assert len(log.read_text().splitlines()) == 800 + 24  # samples, and steps that met them again
    Drops(log, 28, {"names": manifest})  # what a first reading leaves elsewhere is no part of the list
    tracemalloc.start()
    resumed = opened(28)
    gc.collect()  # what the interpreter keeps for the next tuples
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert resumed.counts == {"names: missing_shard": 2800} and held < 10_000  # bytes
    for step in range(28, 32):
        resumed.add(step, lost[100 * step % 800 :][:100])
    resumed.close()
    assert len(log.read_text().splitlines()) == 800 + 24 and resumed.counts == drops.counts


def test_a_shard_that_samples_listed_before_tell_to_be_lost_is_lost_after_a_resume(tmp_path: Path) -> None:
    manifest = Manifest.read(good_set(tmp_path / "set", (2, 8), has_text=False))
    log = tmp_path / "dropped.jsonl"
    drops = Drops(log, 0, {"names": manifest})
    drops.begin()
    drops.add(1, [Dropped("names", "000000.tar", 1, "corrupt", "")])
    drops.add(2, [Dropped("names", "000000.tar", 1, "missing_shard", "")])
    for loaded in (drops, Drops(log, 3, {"names": manifest})):
        assert loaded.counts == {"names: corrupt": 1, "names: missing_shard": 1}
        with pytest.raises(
            DataError, match=r"1 of 2 shards of source 'names' are lost \(000000.tar; .* 2 of 10"
        ):
            loaded.check(1000, 0.1)
    Drops(log, 2, {"names": manifest}).check(1000, 0.1)


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: the last write before the end is cut."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_delays_the_list_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "dropped.jsonl"
    bad = [[Dropped("names", "000000.tar", index, "truncated", "it ends early")] for index in range(6)]

    def listed() -> list[tuple[int, int]]:
        return [(line["step"], line["index"]) for line in map(json.loads, log.read_text().splitlines())]

    drops = Drops(log, 0, {})
    drops.begin()
    drops.add(3, bad[0])
    with full_disk(log.stat().st_size + 50):  # in the middle of a line
        drops.add(4, bad[1])
        drops.add(5, bad[2])
    assert capsys.readouterr().err.count("NOT WRITTEN") == 1
    assert listed() == [(3, 0)] and drops.counts == {"names: truncated": 3}
    drops.add(6, bad[3])
    assert listed() == [(3, 0), (4, 1), (5, 2), (6, 3)]
    resumed = Drops(log, 5, {})
    with full_disk(10):
        resumed.begin()
        resumed.add(5, bad[4])
    resumed.add(7, bad[5])
    assert listed() == [(3, 0), (4, 1), (5, 4), (7, 5)] and resumed.counts == {"names: truncated": 4}
    closed = Drops(log, 4, {})
    capsys.readouterr()
    with full_disk(10):
        closed.begin()
        closed.add(4, bad[4])
        closed.close()
    assert capsys.readouterr().err.count("LOST: 1 records") == 1
    following = Drops(log, 5, {})
    following.begin()
    following.add(5, bad[5])
    closed.close()
    assert listed() == [(3, 0), (4, 1), (5, 5)]


def test_the_replacement_is_the_next_sample_of_the_source(tmp_path: Path) -> None:
    run = small_run(data={"spoilt": Source("category")}, batch=20, max_bad=0.05)
    whole = [batch for batch, _ in islice(rounds(run, spoilt(tmp_path / "whole", {})), 10)]
    loader = Loader(run, {"spoilt": tmp_path / "whole" / "spoilt"}, None, rank=0, world=1)
    position = 47
    pick, following = (loader._steps.order[p] for p in (position, position + 1))
    number = pick.shard * 100 + pick.index
    folder = spoilt(tmp_path / "bad", {number: {**sample(0, has_text=False), "jpg": b""}})
    replaced = [batch for batch, _ in islice(rounds(run, folder), 10)]
    assert_same(joined(whole[:2] + whole[3:]), joined(replaced[:2] + replaced[3:]))
    assert int(replaced[2].category[7]) == (following.shard * 100 + following.index) % 3
    assert not torch.equal(whole[2].views[7], replaced[2].views[7])


def test_too_many_bad_samples_stop_the_run_with_counts_and_a_remedy(tmp_path: Path) -> None:
    broken = {**sample(0, has_text=False), "jpg": b"\xff\xd8 broken"}
    folder = spoilt(tmp_path, {index: broken for index in range(0, 200, 10)})  # 10 %
    run = small_run(data={"spoilt": Source("category")}, batch=20)
    with pytest.raises(
        DataError, match=r"samples read so far are bad \(spoilt: \w+ \d+; .*max_bad=0.01.*data_prep check"
    ):
        list(islice(rounds(run, folder), 10))


@pytest.mark.parametrize(("share", "stopped"), [(0.005, 0), (0.02, 200)])
def test_ranks_stop_for_a_share_above_the_limit_and_not_by_chance(share: float, stopped: int) -> None:
    """Of 200 ranks that read 20,000 samples each, as many as are given."""
    found = 0
    for rank in range(200):
        bad = np.cumsum(np.random.RandomState(rank).rand(20_000) < share)
        try:
            for num_reads in range(20, 20_001, 20):
                check_bad_share({"a": int(bad[num_reads - 1])}, num_reads, 0.01, "", beyond_chance)
        except DataError:
            found += 1
    assert found == stopped


def test_one_of_many_shards_may_be_lost_and_one_of_few_may_not(tmp_path: Path) -> None:
    for num_shards, lasts in ((150, True), (10, False)):
        samples = [sample(n, has_text=False) for n in range(4)]
        folder = write_set(tmp_path / str(num_shards), [samples] * num_shards)
        run = small_run(data={"names": Source("category")}, batch=4, mixing=Mixing(window=2))
        loader = Loader(run, {"names": folder}, None, rank=0, world=1)
        (folder / f"{loader._steps.order[9].shard:06d}.tar").unlink()
        if lasts:
            list(islice(loader, 30))
            assert loader.dropped == {"names: missing_shard": 4}
            loader.close()
            with pytest.warns(UserWarning, match=r"is missing.*1 such shards"):
                assert (
                    len(batches(run, {"names": folder}, 20, start_step=2)) == 20
                )  # in the lost shard's window
        else:
            with pytest.raises(
                DataError, match=r"1 of 10 shards of source 'names' are lost \(\d+.tar; .*4 of 40"
            ):
                list(islice(loader, 30))
            loader.close()


def test_shards_that_were_copied_again_are_lost_no_more(tmp_path: Path) -> None:
    """One of ten was, and is mended before another one goes: never more than max_bad at once."""
    folder = write_set(tmp_path / "names", [[sample(n, has_text=False) for n in range(2)]] * 10)
    run = small_run(data={"names": Source("category")}, max_bad=0.1)
    log = tmp_path / "dropped.jsonl"
    lost = [folder / "000002.tar", folder / "000007.tar"]
    content = lost[0].read_bytes()

    def go_on(first: int, until: int) -> dict[str, int]:
        loader = Loader(run, {"names": folder}, None, rank=0, world=1, start_step=first, dropped_to=log)
        list(islice(loader, until - first))
        loader.close()
        return loader.dropped

    lost[0].write_bytes(content[:700])
    with pytest.warns(UserWarning, match="1 such shards"):
        assert go_on(1, 6).keys() == {"names: truncated_shard"}
    lost[0].write_bytes(content)
    lost[1].unlink()
    with pytest.warns(UserWarning, match="1 such shards"):
        assert go_on(6, 10)["names: missing_shard"] > 0
    lost[0].unlink()
    with pytest.warns(UserWarning, match="2 such shards"), pytest.raises(DataError, match="2 of 10 shards"):
        go_on(10, 15)


def test_a_source_of_bad_samples_alone_ends_the_run_and_they_are_listed(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "spoilt", [[{"jpg": b"", "cls": b"0", "json": b"{}"}] * 3])
    run = small_run(data={"spoilt": Source("category")}, max_bad=1.0)
    log = tmp_path / "dropped.jsonl"
    loader = Loader(run, {"spoilt": folder}, None, rank=0, world=1, dropped_to=log)
    with pytest.raises(DataError, match="32 samples of source 'spoilt' in turn") as raised:
        next(loader)
    assert list(loader.dropped.values()) == [32]
    assert {record.sample.index for record in records(log) if record.sample is not None} == {0, 1, 2}
    sent = pickle.loads(pickle.dumps(raised.value))
    assert type(sent) is type(raised.value) and str(sent) == str(raised.value)
    assert [one[:4] for one in sent.tried] == [one[:4] for one in raised.value.tried]
    loader.close()


def test_a_broken_caption_is_a_reason(tmp_path: Path) -> None:
    samples = [sample(n, has_category=False) for n in range(40)]
    samples[7] = {**samples[7], "txt": b"caf\xe9", "json": b"{}"}
    samples[9] = {**samples[9], "txt": b" ", "json": b"{}"}
    samples[11] = {**samples[11], "json": b'{"captions": ["half of a pair: \\ud83d"]}'}
    samples[13] = {**samples[13], "json": b'{"captions": "one text, no list"}'}
    samples[15] = {**samples[15], "json": b"[" * 100_000}
    folder = write_set(tmp_path / "spoilt", [samples])
    write_tokenizer(folder / "tokenizer")
    run = small_run(data={"spoilt": Source("text")}, batch=40, max_bad=0.5)
    assert next(rounds(run, folder))[1] == {"spoilt: broken_text": 4, "spoilt: no_caption": 1}


def test_a_shard_that_goes_missing_is_replaced_and_counted(tmp_path: Path) -> None:
    folder = spoilt(tmp_path, {})
    run = small_run(data={"spoilt": Source("category")}, batch=20, max_bad=1.0)
    loader = Loader(run, {"spoilt": folder}, None, rank=0, world=1)
    (folder / "000001.tar").unlink()
    assert next(loader).has_category.all()
    assert loader.dropped.keys() == {"spoilt: missing_shard"}
    loader.close()


def test_a_resume_goes_on_where_shards_were_lost_before_it(tmp_path: Path) -> None:
    folder = good_set(tmp_path / "names", (6,) * 4, has_text=False)
    run = small_run(data={"names": Source("category")}, batch=8, max_bad=1.0)
    loader = Loader(run, {"names": folder}, None, rank=0, world=1)
    (folder / "000000.tar").unlink()
    for number, change in ((1, b"\0"), (2, b"")):
        content = (folder / f"{number:06d}.tar").read_bytes()
        (folder / f"{number:06d}.tar").write_bytes(change + content[1:] if change else content[:1024])
    straight = list(islice(loader, 6))
    assert sum(loader.dropped.values()) == 26  # of two passes: two shards, and a sample
    loader.close()
    with pytest.warns(UserWarning, match=r"000000.tar is missing.*\(3 such shards"):
        resumed = batches(run, {"names": folder}, 3, start_step=3)
    for one, other in zip(straight[3:], resumed, strict=True):
        assert_same(one, other)
    with pytest.raises(FileNotFoundError, match=r"000000.tar is missing"):
        Loader(run, {"names": folder}, None, rank=0, world=1)


def test_a_shard_that_rots_during_training_is_told_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = good_set(tmp_path / "names", has_text=False)
    content = bytearray((folder / "000001.tar").read_bytes())
    content[1500] ^= 1  # in a file of JSON or an image: what it does there does not matter here
    (folder / "000001.tar").write_bytes(content)
    monkeypatch.setattr("pretrain.data.loader.VERIFIED_BYTES", 0)
    run = small_run(data={"names": Source("category")}, max_bad=0.5)
    log = tmp_path / "dropped.jsonl"
    loader = Loader(run, {"names": folder}, None, rank=0, world=1, dropped_to=log)
    with pytest.warns(UserWarning, match=r"000001.tar has sha256 .*\(its samples are used as they are\)"):
        while "names: changed_shard" not in loader.dropped:
            next(loader)
    assert '"shard": "000001.tar", "index": -1, "reason": "changed_shard"' in log.read_text()
    loader.close()


def test_a_shard_that_is_replaced_with_its_index_during_training_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = good_set(tmp_path / "names", has_text=False)
    monkeypatch.setattr("pretrain.data.verified.LOOK_AGAIN", 0.05)
    run = small_run(data={"names": Source("category")}, max_bad=0.5)
    log = tmp_path / "dropped.jsonl"
    loader = Loader(run, {"names": folder}, None, rank=0, world=1, dropped_to=log)
    next(loader)
    content = bytearray((folder / "000001.tar").read_bytes())
    content[1500] ^= 1
    (folder / "other").write_bytes(content)
    (folder / "other").replace(folder / "000001.tar")
    with pytest.warns(
        UserWarning, match=r"000001.tar has sha256 .*\(its samples are used as they are\)"
    ) as told:
        until = time.monotonic() + 30
        while "names: changed_shard" not in loader.dropped:
            assert time.monotonic() < until, "a shard that changed is not told"
            next(loader)
        until = time.monotonic() + 0.5  # many looks
        while time.monotonic() < until:
            next(loader)
    assert len(told) == 1 and loader.dropped == {"names: changed_shard": 1}
    assert log.read_text().count("changed_shard") == 1
    loader.close()


def test_a_lost_shard_is_told_once_and_bad_samples_whenever_their_number_doubles(tmp_path: Path) -> None:
    lines: list[str] = []
    teller = Teller(3, lines.append)
    for number in range(1, 100):
        lost = [Dropped("names", f"{index:06d}.tar", 5, "missing_shard", "is gone") for index in range(5)]
        bad = Dropped("names", "000009.tar", number, "truncated", "it ends\n" + "early " * 10_000)
        teller.tell(number, [*(lost if number in (20, 30) else ()), bad])
    assert [line.partition(": ")[0].split()[-1] for line in lines] == [
        "1",
        "2",
        "4",
        "8",
        "16",
        "20",
        "32",
        "64",
    ]
    assert lines[5] == (
        "REPLACED on rank 3, batch 20: LOST names/000000.tar: missing_shard: is gone; LOST names/000001.tar: "
        "missing_shard: is gone; LOST names/000002.tar: missing_shard: is gone; and 2 more"
    )
    assert "names/000009.tar sample 64: truncated: it ends early early" in lines[-1]
    assert lines[-1].endswith("… (64 such since the start)")
    assert all("\n" not in line and len(line) < 500 for line in lines)


def test_the_console_is_told_of_a_shard_when_it_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = good_set(tmp_path / "names", has_text=False)
    run = small_run(data={"names": Source("category")}, max_bad=1.0)
    loader = Loader(run, {"names": folder}, None, rank=0, world=1)
    (folder / "000001.tar").unlink()
    list(islice(loader, 6))
    loader.close()
    told = [line for line in capsys.readouterr().err.splitlines() if "REPLACED" in line]
    assert loader.dropped["names: missing_shard"] > 5 and len(told) == 1
    assert told[0].startswith("REPLACED on rank 0, batch ") and "LOST names/000001.tar: missing" in told[0]
