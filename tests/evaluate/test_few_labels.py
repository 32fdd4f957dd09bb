"""Is an encoder fine-tuned on few labels by updates, with recipes fit for it, on several draws?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint import load_towers
from pretrain.evaluate import protocols as protocols_module
from pretrain.evaluate.arguments import parse, protocols_of
from pretrain.evaluate.asked import Protocols
from pretrain.evaluate.evidence import NotMeasured
from pretrain.evaluate.fine_tune import Classifier, fine_tune
from pretrain.evaluate.fine_tune_order import Examples
from pretrain.evaluate.fine_tune_recipes import FEW, RECIPES, FineTune
from pretrain.evaluate.protocols import evaluate_checkpoint
from pretrain.evaluate.rows import SHARES
from tests.evaluate.sets import COLORS, write_set

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


def test_recipes_of_few_labels_count_updates_and_are_those_of_their_source() -> None:
    assert FEW.keys() == RECIPES.keys()
    for few in FEW.values():
        assert tuple(few) == SHARES and all(recipe.updates and not recipe.epochs for recipe in few.values())
    one, ten = FEW["paper"].values()
    # Semi-ViT: 100 epochs of 12,811 and 128,116 images at a batch of 512; rates 5e-5 and 2.5e-4 at one of 256.
    assert (one.updates, ten.updates) == (100 * (12_811 // 512), 100 * (128_116 // 512))
    assert one.peak(512) == pytest.approx(2 * 5e-5) and ten.peak(512) == pytest.approx(2 * 2.5e-4)
    assert one.mixup == one.cutmix == one.erasing == one.drop_path == 0 and ten.mixup == 0.8


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_few_shot_with_fine_tune_means_recipes_of_few_labels(recipe: str) -> None:
    asked = ["run", "--few-shot", "--fine-tune", "4", "--fine-tune-recipe", recipe]
    protocols = protocols_of(parse(asked))
    assert protocols.fine_tune.epochs == 4 and protocols.fine_tune_few == FEW[recipe]
    assert protocols.rows[-3:] == ("fine_tune", "few_shot_1_fine_tune", "few_shot_10_fine_tune")
    assert protocols_of(parse(["run", "--few-shot"])).fine_tune_few == {}


def test_a_single_image_of_a_single_category_is_no_reason_to_end(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, color), *_ = COLORS.items()
    monkeypatch.setattr("tests.evaluate.sets.COLORS", {name: color})
    for seed, split in enumerate(("train", "heldout")):
        write_set(tmp_path / split, split, 6, text=False, seed=seed)
    monkeypatch.setattr(protocols_module, "fine_tune", lambda *_, **__: pytest.fail("trained"))
    protocols = Protocols(probes=("knn",), fine_tune_few={10: QUICK}, ks=(5,))
    row = evaluate_checkpoint(step, tmp_path / "train", tmp_path / "heldout", protocols)[
        "few_shot_10_fine_tune"
    ]
    assert row["accuracy"] is None and row["reason"].startswith("10 % of the labels is one image")


def test_few_labels_are_fine_tuned_on_several_draws(step: Path, data: Path) -> None:
    few = {10: QUICK}
    protocols = Protocols(probes=("knn",), fine_tune_few=few, fine_tune_draws=2, ks=(5,))
    found = evaluate_checkpoint(step, data / "train", data / "heldout", protocols)
    assert "fine_tune" not in found
    row = found["few_shot_10_fine_tune"]
    assert row["recipe"]["updates"] == 3 and row["recipe"]["epochs"] == 0
    assert row["train_images"] == 4 and row["seeds"] == [0, 1] and len(row["accuracies"]) == 2
    assert row["accuracy"] == pytest.approx(sum(row["accuracies"]) / 2)
