"""Is an encoder fine-tuned on few labels by updates, with recipes fit for it, on several draws?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint import load_towers
from pretrain.evaluate.evidence import NotMeasured
from pretrain.evaluate.fine_tune import Classifier, fine_tune
from pretrain.evaluate.fine_tune_order import Examples
from pretrain.evaluate.fine_tune_recipes import FineTune
from tests.evaluate.sets import COLORS

QUICK = FineTune(epochs=0, updates=3, batch=8)


@pytest.fixture(scope="module")
def step(run_folder: Path) -> Path:
    return run_folder / "checkpoints" / "step_000000"


def tuned(step: Path, data: Path, **changes: Any) -> dict[str, Tensor]:
    """Weights of the classifier after the quick recipe with changes, on the 40 training images."""
    run, _, towers = load_towers(step)
    train = Examples(data / "train", torch.arange(40))
    recipe = replace(QUICK, **changes)
    return fine_tune(towers, run, train, len(COLORS), recipe, device=torch.device("cpu")).state_dict()


def test_updates_end_a_training_within_an_epoch(step: Path, data: Path) -> None:
    whole = tuned(step, data, updates=10)  # of five an epoch
    assert all(torch.equal(v, whole[n]) for n, v in tuned(step, data, epochs=2, updates=0).items())
    # AdamW moves a weight from zero by its rate at most: three steps of a cosine from a constant peak.
    peak = 2e-3 * (8 / 1024) ** 0.5
    moved = tuned(step, data, warmup=0.0, weight_decay=0.0)["head.weight"].abs()
    assert 0.9 < moved.max() / (peak * (1 + 0.75 + 0.25)) <= 1.2


def test_a_loss_that_is_not_finite_is_told_where_the_last_epoch_is_cut(step: Path, data: Path) -> None:
    with pytest.raises(NotMeasured, match=r"loss of fine-tuning was (nan|inf) in epoch 1"):
        tuned(step, data, base_lr=1e38, warmup=0.0)


def test_a_head_may_learn_faster_than_the_encoder(step: Path) -> None:
    model = Classifier(load_towers(step)[2].encoder, 4)
    plain, faster = (
        {
            id(p): group["lr_scale"]
            for group in model.groups(FineTune(head_rate=rate))
            for p in group["params"]
        }
        for rate in (1.0, 20.0)
    )
    head = [id(parameter) for parameter in model.head.parameters()]
    assert plain | dict.fromkeys(head, 20.0) == faster
