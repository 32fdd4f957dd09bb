"""Are spread features measured as spread, collapsed ones as collapsed, and is a collapse told once?"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import collapse
from pretrain.collapse import (
    FEWEST_STEPS,
    Seen,
    Watch,
    agreement,
    alarm,
    batch_std,
    effective_rank,
    entropy,
    measure,
    replay,
    too_short,
)
from pretrain.config import Run, Teacher
from pretrain.objectives import OBJECTIVES
from tests.engine.launch import together
from tests.engine.toy import toy_run

COUNTS = {"rows": 64, "width": 256}
SPREAD = {"std": 0.06, "effective_rank": 50.0, "agreement": 0.5, **COUNTS}  # limits 0.03125 and 3.15
FLAT = {"std": 0.004, "effective_rank": 50.0, "agreement": 0.0, **COUNTS}


def rows(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_std_is_one_over_root_width_for_a_sphere_and_zero_for_a_constant() -> None:
    assert batch_std(rows(4096, 64)).item() == pytest.approx(64**-0.5, rel=0.05)
    assert batch_std(torch.ones(8, 16)).item() == 0
    assert batch_std(torch.tensor([[3.0, 0.0], [0.0, 5.0]])).item() == pytest.approx(
        0.5
    )  # lengths do not count


def test_effective_rank_of_a_gaussian_is_nearly_its_width_and_follows_its_definition() -> None:
    assert effective_rank(rows(4096, 32)).item() == pytest.approx(32, rel=0.01)
    few = rows(12, 30) * torch.logspace(0, -2, 30) + 5
    values = np.linalg.svd(few.double().numpy() - few.double().numpy().mean(0), compute_uv=False)
    share = values / values.sum()
    expected = math.exp(-(share * np.log(np.maximum(share, 1e-30))).sum())
    assert effective_rank(few).item() == pytest.approx(expected, rel=1e-4)  # of float32's singular values
    assert 1 < expected < collapse.most_rank(12, 30) == 11


@pytest.mark.parametrize("k", [1, 2, 7])
def test_effective_rank_of_k_equal_orthogonal_directions_is_k(k: int) -> None:
    axes = torch.linalg.qr(rows(16, 16, seed=k)).Q[:k]
    both_ways = torch.cat([axes, -axes]) + rows(1, 16)  # their mean is the added row
    assert effective_rank(both_ways).item() == pytest.approx(k, rel=1e-4)


@pytest.mark.parametrize("n", [1, 2, 4096])
def test_equal_rows_have_no_direction_but_one_and_no_spread(n: int) -> None:
    same = rows(1, 384).expand(n, -1) * 100
    assert effective_rank(same).item() == 1
    assert batch_std(same).item() < 1e-6


def test_agreement_is_the_cosine_of_own_pairs_beyond_that_of_all_others() -> None:
    p, t = rows(9, 5, seed=1), rows(9, 5, seed=2)
    a, b = (z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True) for z in (p, t))
    cosines = a @ b.T
    expected = cosines.diagonal().mean() - cosines[~np.eye(9, dtype=bool)].mean()
    assert agreement(p, t).item() == pytest.approx(expected, abs=1e-6)


def test_agreement_is_one_for_spread_twins_and_zero_for_constants() -> None:
    features, constant = rows(512, 64), torch.ones(512, 64)
    assert agreement(features, 3 * features).item() == pytest.approx(1, abs=0.01)
    assert agreement(constant, constant).item() == pytest.approx(0, abs=1e-5)
    assert agreement(constant, features).item() == pytest.approx(0, abs=1e-5)
    assert agreement(features, features.roll(1, dims=0)).item() == pytest.approx(0, abs=0.01)


def test_entropy_is_ln_k_for_even_codes_and_zero_when_one_takes_all() -> None:
    hard = torch.eye(4)[torch.arange(40) % 4]
    assert measure({"codes": Seen(rows(40, 8), codes=hard)})["codes"]["code_entropy"] == pytest.approx(
        math.log(4)
    )
    assert entropy(torch.tensor([0.0, 1.0, 0.0])).item() == 0
    uneven = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy(torch.tensor([0.75, 0.25])).item() == pytest.approx(uneven)


def test_only_what_a_target_has_is_measured() -> None:
    found = measure(
        {"a": Seen(rows(6, 4).bfloat16()), "b": Seen(rows(6, 4), rows(6, 4), torch.full((6, 3), 1 / 3))}
    )
    assert list(found["a"]) == ["std", "effective_rank", "rows", "width"]
    assert list(found["b"]) == [
        "std",
        "effective_rank",
        "agreement",
        "code_entropy",
        "rows",
        "width",
        "codes",
    ]
    assert (found["b"]["rows"], found["b"]["width"], found["b"]["codes"]) == (6, 4, 3)
    assert measure({}) == {}


def test_a_single_image_gives_finite_values_and_no_collapse() -> None:
    found = measure({"a": Seen(rows(1, 4), rows(1, 4), torch.tensor([[1.0, 0.0]]))})["a"]
    assert (found["std"], found["effective_rank"], found["agreement"], found["code_entropy"]) == (0, 1, 0, 0)
    assert collapse.below_limit(found) == {}


def test_a_value_that_is_not_finite_is_told_as_such() -> None:
    broken = rows(8, 4)
    broken[3, 1] = math.inf
    found = measure({"a": Seen(broken, broken)})["a"]
    assert all(math.isnan(found[quantity]) for quantity in ("std", "effective_rank", "agreement"))


def test_of_a_huge_batch_the_first_rows_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse, "MAX_ROWS", 10)
    features = rows(40, 4)
    found = measure({"a": Seen(features)})["a"]
    assert found["rows"] == 10 and found["std"] == pytest.approx(batch_std(features[:10]).item())


def seen_by(world: int, rank: int) -> dict[str, Seen]:
    """A rank's share of 12 images."""
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    z = rows(12, 5, seed=3)
    codes = torch.softmax(rows(12, 3, seed=5), dim=1)
    return {"a": Seen(z[share], (z + rows(12, 5, seed=4))[share], codes[share]), "b": Seen(z[share] + 2)}


def _on_rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    Path(folder, str(rank)).write_text(json.dumps(measure(seen_by(world, rank))))
    dist.destroy_process_group()


def test_two_ranks_measure_what_one_does_on_all_images(tmp_path: Path, free_port: int) -> None:
    together(_on_rank, 2, free_port, str(tmp_path), world=2)
    alone = measure(seen_by(1, 0))
    for rank in "01":
        found = json.loads((tmp_path / rank).read_text())
        assert found.keys() == alone.keys()
        for name in alone:
            assert found[name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize(("change", "low"), [
    ({}, set()),
    ({"std": 0.0312}, {"std"}),
    ({"effective_rank": 3.1}, {"effective_rank"}),
    ({"codes": 100, "code_entropy": 0.46}, {"code_entropy"}),
    ({"codes": 100, "code_entropy": 0.47}, set()),
    ({"std": 0.0, "rows": 7}, set()),  # too few images to tell
    ({"rows": 8, "effective_rank": 2.1}, set()),  # of 7 directions at most, 2 are asked for
    ({"rows": 4096, "width": 4096, "effective_rank": 200.0}, {"effective_rank"}),
    ({"std": math.nan}, set()),  # the loss tells that
])  # fmt: skip
def test_a_value_below_its_limit_is_found(change: dict[str, float], low: set[str]) -> None:
    assert set(collapse.below_limit(SPREAD | change)) == low


def long_run(**changes: Any) -> Run:
    """One that is judged after its first FEWEST_STEPS steps."""
    return toy_run(steps=2 * FEWEST_STEPS, **changes)


def steps_told(
    run: Run, measured: list[dict[str, float]], begun: int = FEWEST_STEPS
) -> list[tuple[int, int]]:
    """(step at which a collapse is told, step since which it lasts) when these are logged after `begun` steps, both
    counted from there."""
    watch = Watch(run)
    told = [
        (step, watch.after(begun + step, {"dense": values})) for step, values in enumerate(measured, start=1)
    ]
    return [(step, found.since - begun) for step, new in told for found in new]


def test_three_low_values_in_a_row_after_the_beginning_are_a_collapse_told_once() -> None:
    run = long_run()
    assert steps_told(run, [FLAT] * 9, begun=FEWEST_STEPS - 2) == [(5, 3)]
    assert steps_told(run, [SPREAD] * 9) == []
    assert steps_told(run, [FLAT] * 4 + [SPREAD] + [FLAT] * 4 + [SPREAD] + [FLAT] * 4) == [(3, 1)]
    assert steps_told(run, [FLAT, FLAT, SPREAD, FLAT, FLAT, SPREAD]) == []


def test_the_beginning_ends_when_student_and_teacher_have_had_the_time_to_learn() -> None:
    run = long_run()
    warm = replace(run.optim, warmup=150)
    for longer, begun in (
        (replace(run, steps=100 * FEWEST_STEPS), 5 * FEWEST_STEPS),  # 5 % of the steps
        (replace(run, optim=warm), 160),  # and the ten steps that a teacher of momentum 0.9 averages
        (replace(run, steps=400, teacher=Teacher(0.995, 1.0)), 202),
    ):
        assert steps_told(longer, [FLAT] * 9, begun - 2) == [(5, 3)]
    assert steps_told(replace(run, teacher=Teacher(1.0, 1.0)), [FLAT] * 100) == []  # it never moves


@pytest.mark.parametrize("steps", [10, 30, FEWEST_STEPS + 2])
def test_a_short_run_is_told_to_be_too_short_and_never_collapsed(steps: int) -> None:
    run = toy_run(steps=steps)
    assert steps_told(run, [FLAT] * steps, begun=0) == []
    told = "too short to tell: low values count after step 100, and of {} fewer than 3 that are logged come later"
    assert too_short(run) == told.format(steps)


def test_a_run_is_long_enough_when_three_steps_are_logged_after_its_beginning() -> None:
    assert too_short(toy_run(steps=FEWEST_STEPS + 3)) == ""
    sparse = toy_run(steps=2 * FEWEST_STEPS, log_every=50)
    assert too_short(sparse) and not too_short(replace(sparse, steps=5 * FEWEST_STEPS // 2))


def test_a_target_recovers_by_three_good_values_in_a_row_and_may_collapse_again() -> None:
    watch = Watch(long_run())
    held = []
    measured = [FLAT] * 3 + [SPREAD, SPREAD, FLAT] + [SPREAD] * 3 + [FLAT] * 3
    for step, values in enumerate(measured, start=1):
        watch.after(FEWEST_STEPS + step, {"dense": values})
        held.append((bool(watch.collapsed), watch.recovered))
    assert [step for step, (is_held, _) in enumerate(held, start=1) if is_held] == [3, 4, 5, 6, 7, 8, 12]
    assert [step for step, (_, recovered) in enumerate(held, start=1) if recovered == ["dense"]] == [9]


def test_what_training_does_not_change_cannot_collapse() -> None:
    guided = long_run(objective=OBJECTIVES["mvp"])
    (name,) = (name for name, target in guided.objective.targets.items() if target.encoder == "frozen")
    watch = Watch(guided)
    for step in range(FEWEST_STEPS + 1, FEWEST_STEPS + 4):
        watch.after(step, {name: FLAT, "embedding": FLAT})
    assert list(watch.collapsed) == ["embedding"]


def logged(*steps: int) -> list[dict[str, Any]]:
    """Lines of a log whose features are flat, these many steps after the beginning."""
    return [{"step": FEWEST_STEPS + step, "collapse": {"dense": FLAT}} for step in steps]


def test_a_log_tells_what_its_run_was_told() -> None:
    records = [*logged(*range(-8, 9)), {"step": FEWEST_STEPS + 9}]
    assert str(replay(long_run(), records).collapsed["dense"]) == (
        "target dense: std 0.004, limit 0.0312, since step 101"
    )
    assert replay(long_run(), logged(-1, 0, 1, 2)).collapsed == {}


def test_the_alarm_names_target_value_limit_and_remedy() -> None:
    told = alarm(replay(long_run(), logged(1, 2, 3)).collapsed.values())
    assert "COLLAPSE: target dense: std 0.004, limit 0.0312, since step 101" in told
    for remedy in ("text", "backbone.token_norm=batch", "pool.norm=batch", "teacher.momentum", "uniformity"):
        assert remedy in told
    assert told.startswith("!!!") and told.endswith("!!!") and told.count("what to do") == 1
