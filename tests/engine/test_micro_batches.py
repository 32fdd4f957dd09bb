"""Does a rank that takes its share in parts learn the same as one that takes it at once, under every ZeRO stage?

`python test_micro_batches.py FOLDER` is one rank of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import torch

from pretrain.collectives import mean_over_ranks, rank, sum_over_ranks, world_size
from pretrain.config import Run
from pretrain.objective import Target
from pretrain.recipes import load
from tests.engine.launch import start
from tests.engine.test_rows_ranks import share
from tests.fakes import FACTS, random_batch, shrink

STEPS, IMAGES = 2, 16
TOLERANCE = 1e-4  # float32 sums in another order
DIVIDED = {"stage3_param_persistence_threshold": 0}  # all weights of these models are below that of zero3
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", DIVIDED),
}
MORE = {
    "pixels": Target("pixels", "gaussian", "same", "raw", "none", scored="hidden"),
    "global": Target("global", "boltzmann", "other", "ema", "negatives"),
    "tags": Target("tags", "bernoulli", "same", "raw", "none"),
}
PARTS = {"m3i": 2, "clip": 4}  # of a rank's four pairs, of its eight images
CASES = [(method, stage) for method in PARTS for stage in STAGES]
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter_tensor")  # of DeepSpeed's backend; ours go past it
SMALL = 1e-3  # of the whole gradient's norm: smaller ones of a parameter are compared with that
LARGE = 100  # numbers: reductions of more are of gradients, of fewer of norms


def run_of(method: str) -> Run:
    """M3I of InternImage with more targets and norms over the batch, and CLIP of a ViT; both with drop path."""
    if method == "m3i":
        run = shrink(load("m3i.demo"))
        backbone = replace(run.backbone, drop_path=0.3, token_norm="batch", activation_checkpoint="full")
        objective = replace(run.objective, targets=run.objective.targets | MORE)
        run = replace(run, backbone=backbone, objective=objective)
    else:
        run = shrink(load("rows.contrastive_language_image"))
        run = replace(run, backbone=replace(run.backbone, drop_path=0.3, token_norm="batch"))
    # A tiny rate: AdamW makes whole steps of the rounding of gradients near 0.
    return replace(run, batch=IMAGES, steps=2 * STEPS, optim=replace(run.optim, lr=1e-6, warmup=0))


@contextmanager
def counted(counts: Counter[str]) -> Iterator[None]:
    """Adds DeepSpeed's calls that reduce LARGE tensors, and the numbers in them, to `counts`."""
    from deepspeed.comm import comm

    found = {name: getattr(comm.cdb, name) for name in REDUCTIONS}

    def counting(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            tensors = [one for one in (*arguments, *options.values()) if isinstance(one, torch.Tensor)]
            size = max(one.numel() for one in tensors)
            if size > LARGE:
                counts["calls"] += 1
                counts["numbers"] += size
            return found[name](*arguments, **options)

        return call

    for name in REDUCTIONS:
        setattr(comm.cdb, name, counting(name))
    try:
        yield
    finally:
        for name in REDUCTIONS:
            delattr(comm.cdb, name)


def keep_gradients(engine: Any) -> list[dict[str, torch.Tensor]]:
    """Gets this rank's slices of the gradient of every step, by parameter, before the optimizer moves."""
    from pretrain.gradient_parts import local_gradient

    kept, move = [], engine._move

    def look_and_move() -> None:
        slices = {name: local_gradient(p) for name, p in engine._student.module.named_parameters()}
        kept.append({name: one.flatten().clone() for name, one in slices.items() if one is not None})
        move()

    engine._move = look_and_move
    return kept


def differences(parts: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of the difference of two gradients over that of the second, by parameter; a collective call."""
    assert parts.keys() == whole.keys()
    names: list[list[str]] = [[] for _ in range(world_size())]
    torch.distributed.all_gather_object(names, sorted(whole))
    every = sorted({name for of_rank in names for name in of_rank})
    squares = torch.zeros(len(every), 2)
    for index, name in enumerate(every):
        if name in whole:
            pair = parts[name] - whole[name], whole[name]
            squares[index] = torch.stack([one.float().square().sum() for one in pair])
    norms = sum_over_ranks(squares).sqrt()
    floor = norms[:, 1].norm() * SMALL
    return dict(zip(every, (norms[:, 0] / norms[:, 1].clamp(min=floor)).tolist(), strict=True))


def learn(
    method: str, stage: str, micro_batches: int
) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    """What the log says of every step and what the last one reduced; the gradient of every step."""
    from tests.engine.whole_engine import float32_engine  # here: only ranks need DeepSpeed

    run, (name, changes) = run_of(method), STAGES[stage]
    engine = float32_engine(run, FACTS, name, changes, smooth=True, micro_batches=micro_batches)
    gradients = keep_gradients(engine)
    curve, counts = [], Counter()
    for step in range(STEPS):
        batch = random_batch(run, IMAGES, seed=step)
        batch = share(replace(batch, position=batch.position + step * IMAGES))
        counts.clear()
        with counted(counts):
            losses = engine.step(batch)
        curve.append({name: mean_over_ranks(value).item() for name, value in losses.nats.items()})
        curve[-1] |= {
            "total": mean_over_ranks(losses.total).item(),
            "grad_norm": float(engine.grad_norm),
            "image_norm": engine.balance.image_norm.item(),
            "label_norm": engine.balance.label_norm.item(),
        }
    return {"curve": curve, "reduced": dict(counts)}, gradients


def run_rank(folder: Path) -> None:
    from pretrain.distributed import start_distributed
    from pretrain.main import quieten

    quieten()
    torch.set_num_threads(1)
    start_distributed()
    found: dict[str, Any] = {}
    for method, stage in CASES:
        found[f"{method}-{stage}-1"], whole = learn(method, stage, 1)
        found[f"{method}-{stage}-{PARTS[method]}"], parts = learn(method, stage, PARTS[method])
        found[f"{method}-{stage}-gradient"] = list(map(differences, parts, whole))
    if rank() == 0:
        (folder / "result.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcome by case; one launch, since most of its time is imports."""
    folder = tmp_path_factory.mktemp("parts")
    codes, output = start(folder, world=2, script=Path(__file__))
    assert codes == [0, 0], f"ranks ended with {codes}:\n{output}"
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_micro_batches_equal_one_batch(found: dict[str, Any], method: str, stage: str) -> None:
    parts, whole = (found[f"{method}-{stage}-{number}"]["curve"] for number in (PARTS[method], 1))
    assert len(parts) == STEPS
    for step, (computed, expected) in enumerate(zip(parts, whole, strict=True)):
        assert computed == pytest.approx(expected, rel=TOLERANCE), f"step {step}"


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_the_gradient_in_parts_is_that_of_the_whole_batch(
    found: dict[str, Any], method: str, stage: str
) -> None:
    steps = found[f"{method}-{stage}-gradient"]
    assert len(steps) == STEPS and all(len(of_step) > 40 for of_step in steps)
    for step, of_step in enumerate(steps):
        worst = max(of_step, key=of_step.get)
        assert of_step[worst] < TOLERANCE, f"step {step}: {worst}"


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_gradients_are_reduced_once_a_step(found: dict[str, Any], method: str, stage: str) -> None:
    parts, whole = (found[f"{method}-{stage}-{number}"]["reduced"] for number in (PARTS[method], 1))
    assert parts["numbers"] == whole["numbers"] > 0
    assert parts["calls"] <= whole["calls"]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_rank(Path(sys.argv[1]))
