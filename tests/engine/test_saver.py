"""Is a checkpoint written beside training, whole or not at all, wherever it lies, and are the right ones kept?"""

from __future__ import annotations

import errno
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from data_prep.claim import ClaimLost
from pretrain import checkpoint, intact
from pretrain.checkpoint import stores
from pretrain.checkpoint.__main__ import main
from pretrain.checkpoint.ranges import Files
from pretrain.checkpoint.snapshot import Snapshot
from pretrain.checkpoint.stores import Disk, Remote, store_at
from pretrain.exits import Postponed, Preempted
from pretrain.loop import Job, _save, _stop
from pretrain.monitor import Monitor
from tests.data.s3 import Store, s3_store
from tests.engine.toy import FACTS, ToyTowers, toy_run
from tests.evaluate.runs import Untrained


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def engine() -> Untrained:
    """What a saver needs of an engine after step 1."""
    torch.manual_seed(0)
    return Untrained(toy_run(), ToyTowers(), 1)


def saver_of(engine: Untrained, place: Any) -> checkpoint.Saver:
    return checkpoint.Saver(engine, place, FACTS, None)


def save_at(saver: checkpoint.Saver, engine: Untrained, *steps: int) -> None:
    for engine.steps_done in steps:
        saver.save(wait=True)


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, {0, 5, 6}),
        ({"keep_last": 1}, {0, 6}),
        ({"keep_last": 1, "keep_every": 2, "save_every": 1}, {0, 2, 4, 6}),
    ],
)
def test_the_first_the_newest_and_the_multiples_are_kept(
    tmp_path: Path, changes: dict[str, int], left: set[int]
) -> None:
    engine = Untrained(toy_run(**changes), ToyTowers(), 0)
    save_at(saver_of(engine, tmp_path), engine, *range(7))
    assert checkpoint.steps_in(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_a_broken_checkpoint_does_not_count_as_kept(engine: Untrained, tmp_path: Path) -> None:
    saver = saver_of(engine, tmp_path)
    save_at(saver, engine, 9, 1, 2)
    (tmp_path / "step_000002" / "run.json").write_text("{")
    save_at(saver, engine, 3)
    assert checkpoint.steps_in(tmp_path) == {1, 3, 9}


def test_a_checkpoint_that_is_given_up_does_not_count_as_kept(tmp_path: Path) -> None:
    engine, gone = Untrained(toy_run(keep_last=2), ToyTowers(), 0), set[int]()
    saver = checkpoint.Saver(engine, tmp_path, FACTS, None, given_up=lambda: gone)
    save_at(saver, engine, 800, 850)
    gone.add(850)
    save_at(saver, engine, 900)
    assert checkpoint.steps_in(tmp_path) == {800, 900}


def test_two_checkpoints_that_the_evidence_needs_stay_beside_the_newest(tmp_path: Path) -> None:
    engine = Untrained(toy_run(keep_last=1), ToyTowers(), 0)
    saver = checkpoint.Saver(engine, tmp_path, FACTS, None, needed=lambda: [6, 2, 1, 3])
    save_at(saver, engine, *range(7))
    assert checkpoint.steps_in(tmp_path) == {0, 1, 2, 6}


def test_what_is_written_is_what_was_there_when_the_save_began(
    engine: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, write = threading.Event(), Disk.write
    monkeypatch.setattr(Disk, "write", lambda *arguments: begun.wait(60) and write(*arguments))
    expected = {name: values.clone() for name, values in engine.average.state().items()}
    saver = saver_of(engine, tmp_path)
    saver.save()
    assert checkpoint.latest(tmp_path) is None and saver.poll() == []
    engine.before_move()  # as the engine does before it moves the weights
    for values in engine.average.state().values():
        values.zero_()
    begun.set()
    saver.finish()
    assert [line[:5] for line in saver.poll()] == ["saved"]
    found = checkpoint.load_teacher(checkpoint.latest(tmp_path))
    assert all(torch.equal(found[name].flatten(), values) for name, values in expected.items())


def test_a_part_that_hangs_is_told_beside_until_it_is_written(
    engine: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, told, hangs, write = threading.Event(), [], threading.Event(), Disk.write
    monkeypatch.setattr(
        Disk, "write", lambda *arguments: hangs.set() or (may_write.wait(60) and write(*arguments))
    )
    saver = checkpoint.Saver(engine, tmp_path, FACTS, None, beside=told.append)
    saver.save()
    assert hangs.wait(60) and told[-1] == "writes its part of step_000001"
    may_write.set()
    saver.finish()
    assert told[-1] == "" and told[-2].startswith("deletes") and told[-4].startswith("publishes")


def test_weights_do_not_move_before_they_are_copied(
    engine: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_copy, copy = threading.Event(), Snapshot.copy
    monkeypatch.setattr(Snapshot, "copy", lambda snapshot: may_copy.wait(60) and copy(snapshot))
    saver = saver_of(engine, tmp_path)
    saver.save()
    mover = threading.Thread(target=engine.before_move)
    mover.start()
    mover.join(0.1)
    assert mover.is_alive()
    may_copy.set()
    mover.join(60)
    assert not mover.is_alive()
    saver.finish()


def test_a_second_save_waits_for_the_first_and_says_so(
    engine: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, write = threading.Event(), Disk.write
    monkeypatch.setattr(Disk, "write", lambda *arguments: begun.wait(60) and write(*arguments))
    saver = saver_of(engine, tmp_path)
    saver.save()
    threading.Timer(0.1, begun.set).start()
    engine.steps_done = 2
    saver.save(wait=True)
    assert checkpoint.steps_in(tmp_path) == {1, 2}
    first, waited, second = saver.poll()
    assert "step_000001" in first and "step_000002" in second
    assert waited.startswith("WAITED") and "raise save_every or name a faster place" in waited


def test_a_full_disk_is_told_and_training_goes_on(
    engine: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saver_of(engine, tmp_path)
    save_at(saver, engine, 1)
    room = Disk.room
    monkeypatch.setattr(Disk, "room", lambda self: 2**20)
    engine.steps_done = 2
    saver.save()
    with pytest.raises(
        OSError, match=r"step_000002 could not be written \(.*1 MiB are free, it needs 16 MiB"
    ):
        saver.finish()
    assert "earlier ones are untouched: free space there" in saver.poll()[-1]
    assert checkpoint.steps_in(tmp_path) == {1} and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(Disk, "room", room)
    save_at(saver, engine, 3)
    assert checkpoint.latest(tmp_path, hashes=True) == tmp_path / "step_000003"


def test_what_a_disk_has_changed_is_found_before_anything_is_deleted(
    engine: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saver_of(engine, tmp_path)
    save_at(saver, engine, 1, 2)
    write = Disk.write

    def write_wrongly(disk: Disk, name: str, content: bytearray) -> None:
        write(disk, name, content[:-1] + b"\x7f")

    monkeypatch.setattr(Disk, "write", write_wrongly)
    engine.steps_done = 3
    with pytest.raises(OSError, match="reads back with other bytes than were written"):
        saver.save(wait=True)
    assert checkpoint.steps_in(tmp_path) == {1, 2} and len(list(tmp_path.iterdir())) == 2


def test_a_step_that_is_repeated_is_replaced(engine: Untrained, tmp_path: Path) -> None:
    saver = saver_of(engine, tmp_path)
    save_at(saver, engine, 1)
    engine.average.state()["embed.bias"].fill_(7.0)
    save_at(saver, engine, 1)
    assert checkpoint.load_teacher(tmp_path / "step_000001")["embed.bias"].eq(7).all()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_reader_of_a_slice_reads_little_more_than_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.arange(2.0**21))

    engine = Untrained(toy_run(), Wide(), 1)
    save_at(saver_of(engine, tmp_path), engine, 1)
    counted, read = [], Disk.read
    monkeypatch.setattr(Disk, "read", lambda *a: counted.append(read(*a)) or counted[-1])
    target = torch.empty(1000)
    Files(store_at(tmp_path / "step_000001")).fill("teacher", "teacher", {"weight": (12345, target)})
    assert torch.equal(target, torch.arange(12345.0, 13345.0))
    assert sum(len(content) for content in counted) < 4000 + 1000


@pytest.fixture(scope="module")
def s3() -> Iterator[Store]:
    with s3_store() as store:
        yield store


@pytest.fixture
def place(s3: Store, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A URL of this test alone, of a store without faults."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # ours are what is tested
    monkeypatch.setattr(s3.faults, "methods", ("GET", "HEAD", "PUT", "POST", "DELETE"))
    monkeypatch.setattr(s3.faults, "refused", 0.0)
    return f"s3://bucket/{request.node.name}"


def test_a_store_that_fails_at_times_holds_the_same_checkpoints(
    engine: Untrained, s3: Store, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_at(saver_of(engine, tmp_path), engine, 1)
    monkeypatch.setattr(s3.faults, "refused", 0.3)
    before = s3.faults.num_refused
    saver = saver_of(engine, place)
    save_at(saver, engine, 1, 2, 3)
    assert s3.faults.num_refused > before + 5
    monkeypatch.setattr(s3.faults, "refused", 0.0)
    assert checkpoint.steps_in(place) == {2, 3}
    assert checkpoint.latest(place, hashes=True) == f"{place}/step_000003"
    there, here = Remote(f"{place}/step_000003"), Disk(tmp_path / "step_000001")
    assert there.sizes().keys() == here.sizes().keys()
    found, expected = (checkpoint.load_teacher(where) for where in (there.url, here.folder))
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_what_a_killed_process_left_in_a_store_is_never_used(
    engine: Untrained, s3: Store, place: str
) -> None:
    save_at(saver_of(engine, place), engine, 1, 2)
    s3.files.rm_file(f"{place}/step_000002/{intact.COMPLETE}")
    with pytest.warns(UserWarning, match="step_000002 is skipped, since COMPLETE is missing"):
        assert checkpoint.latest(place) == f"{place}/step_000001"
    saver_of(engine, place)
    assert checkpoint.steps_in(place) == {1}


def test_a_store_that_stays_away_is_told_and_training_goes_on(
    engine: Untrained, s3: Store, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saver_of(engine, place)
    save_at(saver, engine, 1)
    for patience, refusal in ((0.1, s3.faults.refusal), (3600.0, ("403 Forbidden", "ExpiredToken"))):
        with monkeypatch.context() as away:
            away.setattr(stores, "PATIENCE", patience)
            away.setattr(s3.faults, "refusal", refusal)
            away.setattr(s3.faults, "refused", 1.0)
            engine.steps_done = 2
            saver.save()
            saver._thread.join()
        told = saver.poll()[-1]
        assert "NOT SAVED" in told and ("mend the keys or rights" in told) == (patience > 1)
    assert checkpoint.latest(place) == f"{place}/step_000001"
    save_at(saver, engine, 3)
    assert checkpoint.latest(place) == f"{place}/step_000003"


class Silent:
    """A file system in memory that takes the first question of each kind and never answers; writing takes long."""

    def __init__(self) -> None:
        self.memory, self.calls, self.ends = fsspec.filesystem("memory"), [], threading.Event()

    def __getattr__(self, name: str) -> Any:
        def ask(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            if self.calls.count(name) == 1:
                self.ends.wait(0.3 if name == "pipe_file" else 60)
            return getattr(self.memory, name)(*arguments, **options)

        return self.memory._strip_protocol if name == "_strip_protocol" else ask


def test_a_store_that_takes_a_question_and_never_answers_is_asked_again_unless_it_writes(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    silent = Silent()
    request.addfinalizer(silent.ends.set)
    monkeypatch.setattr(stores, "_connected", lambda url: silent)
    monkeypatch.setattr(stores, "ATTEMPT", 0.1)
    monkeypatch.setattr(stores, "PATIENCE", 20.0)
    place = Remote("memory://silent/place")
    place.write("step_000001/run.json", b"{}")
    assert silent.calls == ["pipe_file"]
    assert place.read("step_000001/run.json") == b"{}"
    assert place.sizes() == {"step_000001/run.json": 2} and place.folders() == ["step_000001"]
    assert all(silent.calls.count(name) >= 2 for name in ("cat_file", "find", "ls"))


def test_a_place_that_another_process_took_over_ends_the_run(engine: Untrained, tmp_path: Path) -> None:
    lost = False

    def require() -> None:
        if lost:
            raise ClaimLost("was taken over")

    saver = checkpoint.Saver(engine, tmp_path, FACTS, None, require)
    save_at(saver, engine, 1)
    lost = True
    engine.steps_done = 2
    saver.save()
    saver._thread.join()
    saver.poll()  # ranks hear of it at different steps: they stop together, as the loop has them agree
    assert saver.is_lost
    with pytest.raises(ClaimLost, match=r"step_000002 was not written: was taken over"):
        saver.finish()
    assert checkpoint.steps_in(tmp_path) == {1}


def test_a_run_that_loses_its_place_while_it_stops_is_not_told_to_go_on(
    engine: Untrained, tmp_path: Path
) -> None:
    def require() -> None:
        raise ClaimLost("was taken over")

    saver = checkpoint.Saver(engine, tmp_path, FACTS, None, require)
    job = Mock(spec=Job, saver=saver, engine=engine, run=engine.run, watchdog=Mock())
    with pytest.raises(ClaimLost, match=r"step_000001 was not written: was taken over"):
        _stop(job, Mock(spec=Monitor))


@pytest.mark.parametrize(
    ("fault", "end", "told"),
    [
        (
            OSError(errno.EIO, "Input/output error"),
            Postponed,
            "all 9 steps are made, and their checkpoint .*step_",
        ),
        (PermissionError("denied"), checkpoint.Lasting, r"^checkpoint .*could not be written \(.*denied"),
        (TypeError("a fault of ours"), checkpoint.Lasting, "a fault of ours"),
    ],
)
def test_a_last_checkpoint_that_fails_for_now_ends_the_run_to_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, end: type[Exception], told: str
) -> None:
    engine = Untrained(toy_run(steps=9), ToyTowers(), 9)
    saver = saver_of(engine, tmp_path)
    save_at(saver, engine, 6)
    engine.steps_done = 9
    monkeypatch.setattr(Disk, "write", Mock(side_effect=fault))
    job = Mock(spec=Job, saver=saver, engine=engine, run=engine.run, watchdog=Mock())
    with pytest.raises(end, match=told):
        _save(job, is_last=True)
    with pytest.raises(Preempted, match="from the last checkpoint, since this step could not be saved"):
        _stop(job, Mock(spec=Monitor))
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000006"


def test_one_file_that_finds_no_room_is_told_and_leaves_nothing(
    engine: Untrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_at(saver_of(engine, checkpoint.checkpoints_of(tmp_path)), engine, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        assert main(["consolidate", str(tmp_path), "--out", str(tmp_path / "weights.safetensors")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err
    assert "weights.safetensors could not be written" in told and "free space there" in told
    assert not list(tmp_path.glob("*weights*"))


def test_the_command_lists_verifies_and_makes_one_file(
    engine: Untrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_at(saver_of(engine, checkpoint.checkpoints_of(tmp_path)), engine, 0, 40)
    assert main(["ls", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[2:5], row[-1]) for row in rows[1:]] == [
        (step, ["1", "3", "float32"], "yes") for step in ("0", "40")
    ]
    assert main(["verify", str(tmp_path)]) == 0
    file = tmp_path / "weights.safetensors"
    assert main(["consolidate", str(tmp_path), "--of", "student", "--out", str(file)]) == 0
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "linked.safetensors")
    assert main(["consolidate", str(tmp_path), "--out", str(tmp_path / "link.safetensors")]) == 0
    assert (tmp_path / "link.safetensors").is_symlink() and load_file(tmp_path / "linked.safetensors")
    weights = load_file(file)
    assert weights.keys() == ToyTowers().state_dict().keys()
    assert torch.equal(weights["out.weight"].flatten(), engine.average.state()["out.weight"])
    damaged = checkpoint.checkpoint_folder(tmp_path, 40) / "student" / "rank_00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    assert main(["verify", str(tmp_path)]) == 1
    assert "student/rank_00000.safetensors has changed since it was written" in capsys.readouterr().err
    assert main(["ls", str(tmp_path / "nowhere")]) == 1
    damaged.write_bytes(damaged.read_bytes()[:-1])
    file.write_text("mine")
    assert main(["consolidate", str(tmp_path), "--out", str(file)]) == 1
    assert "step_000040 cannot be used, since student/rank_00000.safetensors" in capsys.readouterr().err
    assert main(["consolidate", str(tmp_path), "--out", str(tmp_path / "run.json")]) == 1
    assert "run.json: consolidate writes a file whose name ends in .safetensors" in capsys.readouterr().err
    assert file.read_text() == "mine" and not (tmp_path / "run.json").exists()


def test_weights_are_read_in_inference_mode_too(engine: Untrained, tmp_path: Path) -> None:
    save_at(saver_of(engine, tmp_path), engine, 1)
    with torch.inference_mode():
        weights = checkpoint.load_teacher(tmp_path / "step_000001")
    assert torch.equal(weights["out.weight"].flatten(), engine.average.state()["out.weight"])
