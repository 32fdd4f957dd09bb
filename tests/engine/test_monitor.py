"""Does the log hold what was, once, and stop a run whose losses are not finite?"""

from __future__ import annotations

import errno
import io
import json
import re
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.appended import Appended
from pretrain.balance import BalanceTracker
from pretrain.clock import PARTS, Clock
from pretrain.collapse import Seen
from pretrain.monitor import LOG, Monitor
from pretrain.monitor.console import block
from pretrain.monitor.ranks import Sources, nats_by_source, slowest
from pretrain.monitor.speed import Speed, measured_peak, peak_of
from pretrain.monitor.spent import Spent, spent_before
from pretrain.monitor.trackers import TensorBoard, Wandb, forget, scalars, wandb_id
from pretrain.monitor.window import Window
from pretrain.scoring import Each
from tests.engine.test_records import files_of_at_most
from tests.engine.toy import ToyLosses, toy_run

SPREAD = Seen(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
FLAT = Seen(SPREAD.target * 1e-3 + 1)


def _engine(step: int) -> Any:
    return SimpleNamespace(
        steps_done=step,
        grad_norm=2.0,
        part_norms={"encoder": torch.tensor(1.5)},
        balance=BalanceTracker(),
        lr=1e-3,
        momentum=0.9,
        skipped_steps=0,
    )


def _monitor(out: Path, first_step: int, log_every: int = 1, steps: int = 10, **more: Any) -> Monitor:
    run = toy_run(log_every=log_every, steps=steps)
    return Monitor(out, run, first_step, Clock(torch.device("cpu")), **more)


def test_a_teacher_that_cannot_be_measured_is_told_loudly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"accuracy": None, "reason": "the disk fails", "dropped": {"train": {}, "heldout": {}}}
    fewer = {
        "accuracy": 0.5,
        "chance": 0.1,
        "dropped": {"train": {"truncated": 2, "no_image": 1}, "heldout": {}},
    }
    alerts: list[tuple[str, str]] = []
    tracker = SimpleNamespace(
        begin=print, log=lambda record: None, alert=lambda *told: alerts.append(told), close=print
    )
    with _monitor(tmp_path, 0, trackers=[tracker]) as monitor:
        for step, rows in ((1, {"knn": lost, "zero_shot": lost}), (2, {"knn": fewer})):
            monitor.evaluated(step, rows)
            monitor.after_step(_engine(step), _losses(1.0), {}, {}, {})
    found = [json.loads(line)["evaluation"] for line in (tmp_path / LOG).read_text().splitlines()]
    assert found == [{"step": 1, "knn": lost, "zero_shot": lost}, {"step": 2, "knn": fewer}]
    told = capsys.readouterr().out
    assert told.count("TEACHER OF STEP 1 NOT MEASURED: the disk fails. The training goes on") == 1
    assert "TEACHER OF STEP 2 MEASURED WITHOUT 3 train images that cannot be read" in told
    assert "teacher of step 1" not in told and "teacher of step 2: knn 50.0% (chance 10.0%)" in told
    assert [text.split(" images")[0] for _, text in alerts] == [
        "Teacher of step 1 NOT MEASURED: the disk fails. The training goes on",
        "Teacher of step 2 MEASURED WITHOUT 3 train",
    ]


def _losses(value: float) -> ToyLosses:
    nats = {"dense": torch.tensor(value), "category": torch.tensor(0.5)}
    return ToyLosses(torch.tensor(value), nats, {"dense": SPREAD})


def _follow(out: Path, first_step: int, until: int) -> None:
    with _monitor(out, first_step, 2, speed=Speed(3e9, 1, 1e12), spent=Spent(1, 2.0)) as monitor:
        for step in range(first_step + 1, until + 1):
            with monitor.waiting_for_data():
                pass
            monitor.after_step(_engine(step), _losses(1.0 + step), {"bad_jpeg": 3}, {"seen": 8}, {"a": 0.5})


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def test_a_logged_step_holds_what_report_and_reader_need(tmp_path: Path) -> None:
    _follow(tmp_path, 0, 4)
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert lines[-1]["nats"] == {"dense": 5.0, "category": 0.5}
    assert lines[-1]["dropped"] == {"bad_jpeg": 3} and lines[-1]["epochs"] == {"a": 0.5}
    wanted = "time collapse grad_norm grad_norm_image grad_norm_label grad_norm_by_part lambda lr momentum "
    wanted += "images_per_second pairs_per_second teraflops_per_gpu mfu memory_bytes step_seconds seconds "
    wanted += "eta_seconds gpu_hours gpu_hours_left cost cost_left"
    assert not set(wanted.split()) - lines[-1].keys()
    assert lines[-1]["grad_norm_by_part"] == {"encoder": 1.5}
    assert lines[-1]["seconds"].keys() == set(PARTS)
    assert sum(lines[-1]["seconds"].values()) == pytest.approx(lines[-1]["step_seconds"])
    assert lines[-1]["collapse"]["dense"].keys() == {"std", "effective_rank", "rows", "width"}
    assert lines[-1]["collapse"]["dense"]["width"] == 8


def test_hours_are_told_as_those_of_gpus_where_there_are_some(tmp_path: Path) -> None:
    _follow(tmp_path, 0, 1)
    (record,) = _lines(tmp_path)
    assert record["gpu_hours"] > 0 and "GPU" not in block(record) and "cost" in block(record)
    on_gpus = record | {"memory_bytes": {"allocated": 2**30, "reserved": 2**30, "host": 2**30}}
    assert re.search(r"GPU-hours: .*, .* to go", block(on_gpus))


def test_a_resume_cuts_what_came_after_its_step(tmp_path: Path) -> None:
    _follow(tmp_path, 0, 6)
    with (tmp_path / LOG).open("ab") as log:
        log.write(b'{"step": 3, "na\0\xff\n[]\n')  # a power cut while a block was written
        log.write(b'{"step": 7, "nats"')  # a kill in the middle of a line
    _follow(tmp_path, 4, 8)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 4, 6, 8]


def test_between_logged_steps_nothing_is_read_from_the_device(tmp_path: Path) -> None:
    with _monitor(tmp_path, 1, log_every=5) as monitor:
        nats = {"dense": torch.empty((), device="meta")}  # reading a meta tensor raises
        monitor.after_step(_engine(2), ToyLosses(nats["dense"], nats, {}), {}, {}, {})
    assert _lines(tmp_path) == []


def test_wandb_continues_a_resumed_run_and_no_other(tmp_path: Path) -> None:
    first = wandb_id(tmp_path)
    assert wandb_id(tmp_path) == first
    forget(tmp_path)  # begun again in the same folder
    assert wandb_id(tmp_path) != first


def test_wandb_draws_over_our_step_so_that_a_run_that_has_gone_back_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes, logged = {}, []
    run = SimpleNamespace(
        define_metric=lambda name, step_metric=None: axes.update({name: step_metric}),
        log=lambda record, step=None: logged.append((record["step"], step)),
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    board = Wandb(tmp_path, toy_run())
    for step in (1, 2, 1):
        board.log({"step": step})
    assert axes == {"step": None, "*": "step"}
    assert logged == [(1, None), (2, None), (1, None)]  # a step of wandb's own would drop the last


def _collapse_from(out: Path, first_step: int, until: int, seen: Seen) -> None:
    nats = {"dense": torch.tensor(1.0)}
    with _monitor(out, first_step, steps=200) as monitor:
        for step in range(first_step + 1, until + 1):
            monitor.after_step(_engine(step), ToyLosses(nats["dense"], nats, {"dense": seen}), {}, {}, {})


def test_a_collapse_is_told_once_when_it_is_clear_and_again_at_the_end(tmp_path: Path, capsys: Any) -> None:
    _collapse_from(tmp_path, 98, 106, FLAT)
    told = capsys.readouterr().out
    value = _lines(tmp_path)[4]["collapse"]["dense"]["std"]
    line = f"COLLAPSE: target dense: std {value:.3g}, limit 0.177, since step 101\nwhat to do: predict labels"
    assert told.count("COLLAPSE") == told.count(line) == 2
    clear, end = told.index(line), told.rindex(line)
    assert (
        told.index("step 103/200") < clear < told.index("step 104/200")
    )  # three logged steps after the beginning
    assert told.index("step 106/200") < end
    assert [line.get("collapsed") for line in _lines(tmp_path)] == [None] * 4 + [["dense"]] * 4


def test_spread_features_raise_no_alarm(tmp_path: Path, capsys: Any) -> None:
    _collapse_from(tmp_path, 98, 106, SPREAD)
    assert "COLLAPSE" not in capsys.readouterr().out
    assert not any("collapsed" in line for line in _lines(tmp_path))


def test_a_resume_remembers_a_collapse_and_the_steps_that_lead_to_one(tmp_path: Path, capsys: Any) -> None:
    _collapse_from(tmp_path, 98, 102, FLAT)
    assert "COLLAPSE" not in capsys.readouterr().out
    _collapse_from(tmp_path, 102, 103, FLAT)
    assert "since step 101" in capsys.readouterr().out
    _collapse_from(tmp_path, 103, 104, SPREAD)
    assert capsys.readouterr().out.count("COLLAPSE") == 2  # at the start and at the end
    assert _lines(tmp_path)[-1]["collapsed"] == ["dense"]


def test_trackers_are_told_what_the_log_is_and_alerted_of_a_collapse(tmp_path: Path) -> None:
    alerts, logged = [], []
    fake = SimpleNamespace(
        alert=lambda title, text: alerts.append(text),
        log=lambda record: logged.append(record["collapse"]["dense"]["std"]),
        begin=lambda step: logged.append(f"after {step}"),
        close=lambda: None,
    )
    nats = {"dense": torch.tensor(1.0)}
    with _monitor(tmp_path, 98, steps=200, trackers=[fake]) as monitor:
        for step in range(99, 104):
            monitor.after_step(_engine(step), ToyLosses(nats["dense"], nats, {"dense": FLAT}), {}, {}, {})
        assert len(alerts) == 1 and "target dense" in alerts[0]
    assert len(logged) == 6 and logged[0] == "after 98"


def test_a_short_run_is_told_to_be_too_short_for_a_verdict_and_not_collapsed(
    tmp_path: Path, capsys: Any
) -> None:
    nats = {"dense": torch.tensor(1.0)}
    with _monitor(tmp_path, 0, steps=20) as monitor:
        for step in range(1, 21):
            monitor.after_step(_engine(step), ToyLosses(nats["dense"], nats, {"dense": FLAT}), {}, {}, {})
    told = capsys.readouterr().out
    assert "COLLAPSE" not in told and not any("collapsed" in line for line in _lines(tmp_path))
    assert told.count("collapse of features: too short to tell: low values count after step 100") == 1


def test_inner_parts_are_not_counted_in_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pretrain.clock.time.perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    now[0] = 1.0
    with clock.during("forward"):
        now[0] = 3.0
        with clock.during("teacher"):
            now[0] = 7.0
        now[0] = 15.0
    found = clock.look()
    assert {part: s for part, s in found.items() if s} == {"other": 1.0, "forward": 10.0, "teacher": 4.0}
    now[0] = 16.0
    assert sum(clock.look().values()) == 1.0


def test_on_a_gpu_marks_are_compared_only_when_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, waited = [0.0], []

    class Event:
        """A mark in the queue of a device that does everything 7 ms after it was asked to."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.milliseconds = queue[0] + 7.0

        def synchronize(self) -> None:
            waited.append(self)

        def elapsed_time(self, end: Event) -> float:
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr("torch.cuda.Event", Event)
    clock = Clock(torch.device("cuda"))
    with clock.during("data_wait"):
        queue[0] = 20.0
    with clock.during("backward"):
        queue[0] = 50.0
    assert not waited
    found = clock.look()
    assert waited and found["data_wait"] == pytest.approx(0.02) and found["backward"] == pytest.approx(0.03)


def test_figures_of_speed_are_those_of_the_formula() -> None:
    figures = Speed(flops=8e12, world=4, peak=1e12).figures(seconds=5.0)
    assert figures == {"teraflops_per_gpu": 0.4, "mfu": 0.4}
    assert "mfu" not in Speed(flops=8e12, world=4).figures(seconds=5.0)
    assert 1e8 < measured_peak(torch.float32) < 1e13
    assert peak_of("NVIDIA H200", torch.bfloat16) == 989e12
    assert peak_of("NVIDIA A100-SXM4-40GB", torch.bfloat16) == 312e12
    assert peak_of("NVIDIA GeForce RTX 4090", torch.bfloat16) == 165e12
    for slower in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL"):
        assert peak_of(slower, torch.bfloat16) is None
    assert peak_of("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_of("NVIDIA H200", torch.float32) is None and peak_of("Unheard Of", torch.bfloat16) is None


def test_time_and_money_add_up_over_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = Spent(world=8, price=3.0, gpu_hours=2.0, begun=100.0)
    monkeypatch.setattr("pretrain.monitor.spent.time.monotonic", lambda: 1000.0)  # 900 s on 8 GPUs
    told = spent.after(seconds=9.0, remaining=400)
    assert told["gpu_hours"] == 4.0 and told["cost"] == 12.0
    assert told["eta_seconds"] == 3600.0 and told["gpu_hours_left"] == 8.0 and told["cost_left"] == 24.0
    assert spent.after(seconds=3.0, remaining=100)["eta_seconds"] == 600.0  # between 9 and 3


def test_hours_that_a_kill_or_a_rewind_undid_were_paid_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("pretrain.monitor.spent.time.monotonic", lambda: now[0])

    def follow(first: int, until: int, spent: Spent) -> None:
        with _monitor(tmp_path, first, spent=spent) as monitor:
            for step in range(first + 1, until + 1):
                now[0] += 3600.0
                monitor.after_step(_engine(step), _losses(1.0), {}, {}, {})

    spent = Spent(2, gpu_hours=spent_before(tmp_path))
    follow(0, 4, spent)
    follow(1, 3, spent)  # gone back to step 1 after step 4
    assert [line["gpu_hours"] for line in _lines(tmp_path)] == [2.0, 10.0, 12.0]
    for _ in range(2):  # two starts from step 1, of which the first tells nothing
        spent = Spent(2, gpu_hours=spent_before(tmp_path))
        with _monitor(tmp_path, 1, spent=spent):
            pass
    follow(1, 2, spent)
    assert [line["gpu_hours"] for line in _lines(tmp_path)] == [2.0, 14.0]
    follow(0, 0, spent)  # gone back, and killed before a line
    assert not _lines(tmp_path) and spent_before(tmp_path) == 14.0


def _follow_on_a_full_disk(out: Path, most: int) -> None:
    """Six steps; after step 2 no file may grow beyond `most` bytes, until step 5."""
    board = TensorBoard(out, toy_run())
    with closing(board), _monitor(out, 0, trackers=[board]) as monitor, ExitStack() as full:
        for step in range(1, 7):
            if step == 3:
                full.enter_context(files_of_at_most(most))
            if step == 5:
                full.close()
            monitor.after_step(_engine(step), _losses(1.0), {}, {}, {})


def test_a_full_disk_is_told_once_and_its_lines_are_written_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _follow_on_a_full_disk(tmp_path / "roomy", 2**30)
    (tmp_path / "full").mkdir()
    size = (tmp_path / "roomy" / LOG).stat().st_size
    capsys.readouterr()
    _follow_on_a_full_disk(tmp_path / "full", size * 5 // 12)  # a part of the third line finds room
    told, of_board = capsys.readouterr()
    assert (
        told.count(f"NOT WRITTEN: {tmp_path / 'full' / LOG} ([Errno 27] File too large): training goes on")
        == 1
    )
    assert told.count("log.jsonl is written again, with the 3 records that were kept") == 1
    assert of_board.count("NOT WRITTEN") == of_board.count("is written again") == 1 and "tfevents" in of_board
    assert [line["step"] for line in _lines(tmp_path / "full")] == [1, 2, 3, 4, 5, 6]
    boards = [next((tmp_path / name / "tensorboard").iterdir()) for name in ("roomy", "full")]
    assert [step for step, tags in _events(boards[1]) if "nats/dense" in tags] == [1, 2, 3, 4, 5, 6]
    assert len(_events(boards[0])) == len(_events(boards[1]))


def test_a_console_on_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Full())
    _follow(tmp_path, 0, 4)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 4]


def test_a_line_on_a_terminal_does_not_run_into_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    _follow(tmp_path, 0, 2)
    assert "\rstep 1/10" in terminal.getvalue()  # at the left edge, over a bar that was cleared


def test_what_finds_no_room_for_long_is_bounded_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.appended.MOST_KEPT", 3)
    told: list[str] = []
    file = Appended(tmp_path / "no" / "file", told.append)
    for number in range(5):
        file.add(f"{number}\n".encode())
    file.close()
    assert told[-1].startswith("LOST: 5 records of ")
    (tmp_path / "no").mkdir()
    file.add(b"5\n")
    assert told[-1].endswith("is written again, with the 3 records that were kept, but for the oldest 3")
    assert (tmp_path / "no" / "file").read_text() == "3\n4\n5\n"


def test_a_log_that_cannot_be_cut_where_a_run_goes_back_is_cut_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _follow(tmp_path, 0, 6)
    with files_of_at_most(10):
        monitor = _monitor(tmp_path, 4)
    with monitor:
        monitor.after_step(_engine(5), _losses(9.0), {}, {}, {})
    assert [(line["step"], line["nats"]["dense"]) for line in _lines(tmp_path)][-2:] == [(4, 5.0), (5, 9.0)]


def test_a_rank_that_takes_clearly_longer_is_named() -> None:
    found = slowest([1.0, 1.02, 1.5, 0.98], ["a", "a", "b", "b"])
    assert found == {"rank": 2, "host": "b", "seconds": 1.5, "median_seconds": 1.0}
    assert slowest([1.0, 1.05], ["a", "a"]) is None


def test_losses_of_sources_are_means_over_their_images_that_count() -> None:
    sources = Sources(("first", "second", "third"), torch.tensor([0, 1, 0, 2]))
    nats, counts = (
        torch.tensor([1.0, 2.0, 5.0, 9.0, torch.nan]),
        torch.tensor([True, True, True, True, False]),
    )
    each = Each(nats, counts, torch.tensor([4, 5, 6, 9, 8]))  # sources 0, 1, 0, 1, 0
    assert nats_by_source({"dense": each}, sources) == {"dense": {"first": 3.0, "second": 5.5}}


def test_tensorboard_holds_every_number_of_the_log(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, toy_run())
    board.begin(0)
    board.log(
        {"step": 7, "nats": {"dense": 1.5}, "lr": 0.25, "collapsed": ["dense"], "grad_norm": float("inf")}
    )
    board.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = {tag: (step, value) for step, tags in _events(path) for tag, value in tags.items()}
    assert found["nats/dense"] == (7, 1.5) and found["lr"] == (7, 0.25)
    assert "grad_norm" not in found


def _events(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and numbers of every event, whose checksums are right."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data, found = path.read_bytes(), []
    while data:  # length, its checksum, event, checksum
        length = int.from_bytes(data[:8], "little")
        content = data[12 : 12 + length]
        sums = (int.from_bytes(one, "little") for one in (data[8:12], data[12 + length : 16 + length]))
        assert tuple(sums) == (masked_crc32c(data[:8]), masked_crc32c(content))
        event = Event.FromString(content)
        found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
        data = data[16 + length :]
    return found


def test_a_profile_of_steps_that_the_run_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--profile 8:10 must lie within steps 1 to 9 of the run"):
        Window((8, 10), tmp_path, first_step=4, run_steps=9)


def test_a_run_that_goes_on_behind_its_profile_makes_none(tmp_path: Path) -> None:
    window = Window((3, 5), tmp_path, first_step=4, run_steps=9)
    window.before(5)
    assert window.after(5) is None and not list(tmp_path.iterdir())


def test_numbers_of_a_record_have_paths() -> None:
    assert dict(scalars({"a": {"b": {"c": 1}}, "d": [2], "e": "f"})) == {"a/b/c": 1.0}
