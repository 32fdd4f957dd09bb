"""Does the engine compute what one plain process computes, under every ZeRO stage?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import load_teacher
from pretrain.optim import learning_rate, make_optimizer, teacher_momentum
from tests.engine.conftest import TOLERANCE
from tests.engine.ranks import VARIANTS
from tests.engine.toy import ToyTowers, build_toy, toy_batch, toy_run

STEPS = 5


@pytest.fixture(scope="module")
def stages(ranks: dict[str, Any]) -> dict[str, Any]:
    return ranks["compare_stages"]


@pytest.fixture(scope="module")
def reference() -> tuple[list[dict[str, float]], ToyTowers]:
    """The curve and the teacher of one process: no DeepSpeed, no fork, norms by separate gradients."""
    run = toy_run()
    model, teacher = build_toy()
    teacher.load_state_dict(model.student.state_dict())
    teacher.eval()
    optimizer = make_optimizer(model, run.optim)
    curve, norms, weight = [], {"image": 0.0, "label": 0.0}, 1.0
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run)
        tokens, dense, category = model.losses(toy_batch(step, run.batch), teacher, lambda t: (t, t))
        image = torch.autograd.grad(dense, tokens, retain_graph=True)[0].norm().item()
        label = torch.autograd.grad(category, tokens, retain_graph=True)[0].norm().item()
        optimizer.zero_grad()
        (dense + weight * category).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip).item()
        optimizer.step()
        decay, momentum = run.balance.decay, teacher_momentum(step, run)
        norms = {
            "image": decay * norms["image"] + (1 - decay) * image,
            "label": decay * norms["label"] + (1 - decay) * label,
        }
        weight = run.objective.gamma * norms["image"] / norms["label"]  # the bias correction cancels
        with torch.no_grad():
            for target, source in (
                *zip(teacher.parameters(), model.student.parameters(), strict=True),
                *zip(teacher.buffers(), model.student.buffers(), strict=True),
            ):
                target.copy_(momentum * target + (1 - momentum) * source)
        curve.append(
            {
                "dense": dense.item(),
                "category": category.item(),
                "grad_norm": grad_norm,
                "image_norm": image,
                "label_norm": label,
                "weight": weight,
            }
        )
    return curve, teacher


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one_process(stages: dict[str, Any], reference: Any, variant: str) -> None:
    for computed, expected in zip(stages[variant]["curve"], reference[0], strict=True):
        assert computed == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_teacher_runs_with_its_newest_average(stages: dict[str, Any], reference: Any, variant: str) -> None:
    probe = toy_batch(99, 4).views[:, 0].float() / 255
    answer = torch.tensor(stages[variant]["probe"])
    torch.testing.assert_close(answer, reference[1](probe).flatten(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_teacher_file_is_the_teacher(stages: dict[str, Any], variant: str) -> None:
    teacher = ToyTowers().eval()
    teacher.load_state_dict(load_teacher(Path(stages[variant]["checkpoint"])))
    probe = toy_batch(99, 4).views[:, 0].float() / 255
    answer = torch.tensor(stages[variant]["probe"])
    torch.testing.assert_close(answer, teacher(probe).flatten(), rtol=0, atol=1e-6)  # the same numbers


def test_average_follows_float32_weights_in_bfloat16(ranks: dict[str, Any]) -> None:
    for variant, found in ranks["average_in_bfloat16"].items():
        assert found["dtype"] == "torch.bfloat16", variant
        assert found["moved"] > 1e-6, f"{variant}: nothing to follow"
        assert found["error"] < 1e-6, f"{variant}: ten roundings of float32 weights below 1 stay under 1e-6"
        assert found["naive_error"] > 100 * found["error"], f"{variant}: an average in bfloat16 would do"


def test_what_is_bad_on_one_rank_is_refused_by_all_before_anything_moves(ranks: dict[str, Any]) -> None:
    for case, found in ranks["refuse_what_is_bad"].items():
        assert all(found["stands_still"]), case
        assert "gradient norm is" in found["reasons"][0], case
        assert found["skipped_steps"] == 1 and found["left_out"] == [2], case


def test_a_refused_step_leaves_no_trace_in_those_after_it(ranks: dict[str, Any]) -> None:
    for case, found in ranks["refuse_what_is_bad"].items():
        assert found["rest"] == found["straight"], case


def test_all_ranks_hear_at_the_same_step_that_one_is_asked_to_stop(ranks: dict[str, Any]) -> None:
    assert all(found["asked"] == [True, False] for found in ranks["refuse_what_is_bad"].values())
