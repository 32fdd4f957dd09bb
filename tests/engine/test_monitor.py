"""Does the log hold what was, once, and stop a run whose losses are not finite?"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.balance import BalanceTracker
from pretrain.clock import PARTS, Clock
from pretrain.collapse import Seen
from pretrain.monitor import LOG, Monitor
from pretrain.monitor.ranks import Sources, nats_by_source, slowest
from pretrain.monitor.speed import Speed, Spent, measured_peak, peak_of
from pretrain.monitor.trackers import TensorBoard, scalars, wandb_id
from pretrain.monitor.window import Window
from pretrain.scoring import Each
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


def _monitor(out: Path, first_step: int, log_every: int = 1, **more: Any) -> Monitor:
    return Monitor(out, toy_run(log_every=log_every), first_step, Clock(torch.device("cpu")), **more)


def _losses(value: float) -> ToyLosses:
    nats = {"dense": torch.tensor(value), "category": torch.tensor(0.5)}
    return ToyLosses(torch.tensor(value), nats, {"dense": SPREAD})


def _follow(out: Path, first_step: int, until: int) -> None:
    with _monitor(out, first_step, 2, speed=Speed(flops=3e9, world=1, peak=1e12, price=2.0)) as monitor:
        for step in range(first_step + 1, until + 1):
            with monitor.waiting_for_data():
                pass
            monitor.after_step(_engine(step), _losses(1.0 + step), {"bad_jpeg": 3}, {"seen": 8})


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def test_a_logged_step_holds_what_report_and_reader_need(tmp_path: Path) -> None:
    _follow(tmp_path, 0, 4)
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert lines[-1]["nats"] == {"dense": 5.0, "category": 0.5}
    assert lines[-1]["dropped"] == {"bad_jpeg": 3}
    wanted = "time collapse grad_norm grad_norm_image grad_norm_label grad_norm_by_part lambda lr momentum "
    wanted += "images_per_second pairs_per_second teraflops_per_gpu mfu memory_bytes step_seconds seconds "
    wanted += "eta_seconds gpu_hours gpu_hours_left cost cost_left"
    assert not set(wanted.split()) - lines[-1].keys()
    assert lines[-1]["grad_norm_by_part"] == {"encoder": 1.5}
    assert lines[-1]["seconds"].keys() == set(PARTS)
    assert sum(lines[-1]["seconds"].values()) == pytest.approx(lines[-1]["step_seconds"])
    assert lines[-1]["collapse"]["dense"].keys() == {"std", "effective_rank", "rows", "width"}
    assert lines[-1]["collapse"]["dense"]["width"] == 8


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
        monitor.after_step(_engine(2), ToyLosses(nats["dense"], nats, {}), {}, {})
    assert _lines(tmp_path) == []


def test_wandb_continues_a_resumed_run_and_no_other(tmp_path: Path) -> None:
    first = wandb_id(tmp_path, 0)
    assert wandb_id(tmp_path, 40) == first
    assert wandb_id(tmp_path, 0) != first  # begun again in the same folder


def _collapse_from(out: Path, first_step: int, until: int, seen: Seen) -> None:
    nats = {"dense": torch.tensor(1.0)}
    with _monitor(out, first_step) as monitor:
        for step in range(first_step + 1, until + 1):
            monitor.after_step(_engine(step), ToyLosses(nats["dense"], nats, {"dense": seen}), {}, {})


def test_a_collapse_is_told_once_when_it_is_clear_and_again_at_the_end(tmp_path: Path, capsys: Any) -> None:
    _collapse_from(tmp_path, 0, 8, FLAT)
    told = capsys.readouterr().out
    value = _lines(tmp_path)[4]["collapse"]["dense"]["std"]
    line = f"COLLAPSE: target dense: std {value:.3g}, limit 0.177, since step 3\nwhat to do: predict labels"
    assert told.count("COLLAPSE") == told.count(line) == 2
    clear, end = told.index(line), told.rindex(line)
    assert (
        told.index("step 5/10") < clear < told.index("step 6/10")
    )  # three logged steps after a warm-up of two
    assert told.index("step 8/10") < end
    assert [line.get("collapsed") for line in _lines(tmp_path)] == [None] * 4 + [["dense"]] * 4


def test_spread_features_raise_no_alarm(tmp_path: Path, capsys: Any) -> None:
    _collapse_from(tmp_path, 0, 8, SPREAD)
    assert "COLLAPSE" not in capsys.readouterr().out
    assert not any("collapsed" in line for line in _lines(tmp_path))


def test_a_resume_remembers_a_collapse_and_the_steps_that_lead_to_one(tmp_path: Path, capsys: Any) -> None:
    _collapse_from(tmp_path, 0, 4, FLAT)
    assert "COLLAPSE" not in capsys.readouterr().out
    _collapse_from(tmp_path, 4, 5, FLAT)
    assert "since step 3" in capsys.readouterr().out
    _collapse_from(tmp_path, 5, 6, SPREAD)
    assert capsys.readouterr().out.count("COLLAPSE") == 2  # at the start and at the end
    assert _lines(tmp_path)[-1]["collapsed"] == ["dense"]


def test_trackers_are_told_what_the_log_is_and_alerted_of_a_collapse(tmp_path: Path) -> None:
    alerts, logged = [], []
    fake = SimpleNamespace(
        alert=lambda title, text: alerts.append(text),
        log=lambda record: logged.append(record["collapse"]["dense"]["std"]),
        close=lambda: logged.append("closed"),
    )
    nats = {"dense": torch.tensor(1.0)}
    with _monitor(tmp_path, 0, trackers=[fake]) as monitor:
        for step in range(1, 6):
            monitor.after_step(_engine(step), ToyLosses(nats["dense"], nats, {"dense": FLAT}), {}, {})
        assert len(alerts) == 1 and "target dense" in alerts[0]
    assert len(logged) == 6 and logged[-1] == "closed"


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
    assert peak_of("NVIDIA H200", torch.float32) is None and peak_of("Unheard Of", torch.bfloat16) is None


def test_time_and_money_add_up_over_a_resume() -> None:
    spent = Spent(world=8, price=3.0, gpu_hours=2.0)
    told = spent.after(steps=100, seconds=9.0, remaining=400)  # 900 s on 8 GPUs
    assert told["gpu_hours"] == 4.0 and told["cost"] == 12.0
    assert told["eta_seconds"] == 3600.0 and told["gpu_hours_left"] == 8.0 and told["cost_left"] == 24.0
    assert spent.after(steps=1, seconds=3.0, remaining=100)["eta_seconds"] == 600.0  # between 9 and 3


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
    from tensorboardX.proto.event_pb2 import Event

    board = TensorBoard(tmp_path, toy_run(), 0)
    board.log(
        {"step": 7, "nats": {"dense": 1.5}, "lr": 0.25, "collapsed": ["dense"], "grad_norm": float("inf")}
    )
    board.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), {}
    while data:  # length, its checksum, event, checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + length :]
    assert found["nats/dense"] == (7, 1.5) and found["lr"] == (7, 0.25)
    assert "grad_norm" not in found


def test_a_profile_of_steps_that_are_not_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--profile 3:5 must lie within the steps that are left, 5 to 9"):
        Window((3, 5), tmp_path, first_step=4, run_steps=9)


def test_numbers_of_a_record_have_paths() -> None:
    assert dict(scalars({"a": {"b": {"c": 1}}, "d": [2], "e": "f"})) == {"a/b/c": 1.0}
