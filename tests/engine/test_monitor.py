"""Does the log hold what was, once, and stop a run whose losses are not finite?"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.balance import BalanceTracker
from pretrain.collapse import Seen
from pretrain.monitor import LOG, Monitor, wandb_id
from tests.engine.toy import ToyLosses, toy_run

SPREAD = Seen(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
FLAT = Seen(SPREAD.target * 1e-3 + 1)


def _engine(step: int) -> Any:
    return SimpleNamespace(
        steps_done=step, grad_norm=2.0, balance=BalanceTracker(), lr=1e-3, momentum=0.9, skipped_steps=0
    )


def _losses(value: float) -> ToyLosses:
    nats = {"dense": torch.tensor(value), "category": torch.tensor(0.5)}
    return ToyLosses(torch.tensor(value), nats, {"dense": SPREAD})


def _follow(out: Path, first_step: int, until: int) -> None:
    with Monitor(out, toy_run(log_every=2), first_step) as monitor:
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
    wanted = "time collapse grad_norm grad_norm_image grad_norm_label lambda lr momentum images_per_second "
    wanted += "memory_bytes data_wait_seconds step_seconds"
    assert not set(wanted.split()) - lines[-1].keys()
    assert lines[-1]["collapse"]["dense"].keys() == {"std", "effective_rank", "rows", "width"}
    assert lines[-1]["collapse"]["dense"]["width"] == 8


def test_a_resume_cuts_what_came_after_its_step(tmp_path: Path) -> None:
    _follow(tmp_path, 0, 6)
    with (tmp_path / LOG).open("ab") as log:
        log.write(b'{"step": 3, "na\0\xff\n[]\n')  # a power cut while a block was written
        log.write(b'{"step": 7, "nats"')  # a kill in the middle of a line
    _follow(tmp_path, 4, 8)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 4, 6, 8]


def test_a_loss_that_is_not_finite_ends_the_run_by_name(tmp_path: Path) -> None:
    with (
        Monitor(tmp_path, toy_run(), 0) as monitor,
        pytest.raises(FloatingPointError, match=r"loss \{'dense': nan\} after step 1 must be finite; .*lr"),
    ):
        monitor.after_step(_engine(1), _losses(float("nan")), {}, {})


def test_between_logged_steps_nothing_is_read_from_the_device(tmp_path: Path) -> None:
    with Monitor(tmp_path, toy_run(log_every=5), 1) as monitor:
        nats = {"dense": torch.empty((), device="meta")}  # reading a meta tensor raises
        monitor.after_step(_engine(2), ToyLosses(nats["dense"], nats, {}), {}, {})
    assert _lines(tmp_path) == []


def test_wandb_continues_a_resumed_run_and_no_other(tmp_path: Path) -> None:
    first = wandb_id(tmp_path, 0)
    assert wandb_id(tmp_path, 40) == first
    assert wandb_id(tmp_path, 0) != first  # begun again in the same folder


def _collapse_from(out: Path, first_step: int, until: int, seen: Seen) -> None:
    nats = {"dense": torch.tensor(1.0)}
    with Monitor(out, toy_run(), first_step) as monitor:
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


def test_wandb_is_alerted_of_a_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alerts, logged = [], []
    fake = SimpleNamespace(
        alert=lambda **words: alerts.append(words["text"]),
        log=lambda record, step: logged.append(record["collapse"]["dense"]["std"]),
        finish=lambda: None,
    )
    monkeypatch.setattr("pretrain.monitor._start_wandb", lambda *_: fake)
    nats = {"dense": torch.tensor(1.0)}
    with Monitor(tmp_path, toy_run(), 0, wandb=True) as monitor:
        for step in range(1, 6):
            monitor.after_step(_engine(step), ToyLosses(nats["dense"], nats, {"dense": FLAT}), {}, {})
        assert len(alerts) == 1 and "target dense" in alerts[0]
    assert len(logged) == 5
