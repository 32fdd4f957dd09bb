"""Do heads on a frozen encoder learn from fresh crops, alike on any number of ranks, and leave the encoder alone?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import load_towers
from pretrain.evaluate import fine_tune as fine_tune_module
from pretrain.evaluate import fine_tune_order, frozen
from pretrain.evaluate.arguments import parse, protocols_of
from pretrain.evaluate.asked import Protocols
from pretrain.evaluate.fine_tune import fine_tune, predict
from pretrain.evaluate.fine_tune_inputs import Inputs
from pretrain.evaluate.fine_tune_order import Examples, in_pieces
from pretrain.evaluate.fine_tune_recipes import ATTENTIVE, FROZEN, LINEAR, FineTune
from pretrain.evaluate.frozen import FrozenClassifier, Standardised
from pretrain.evaluate.heads import LinearRecipe, train_heads
from pretrain.evaluate.protocols import evaluate_checkpoint
from tests.evaluate.sets import COLORS

CPU = torch.device("cpu")
SHORT = {name: replace(recipe, epochs=4) for name, recipe in FROZEN.items()}


@pytest.fixture(scope="module")
def step(run_folder: Path) -> Path:
    return run_folder / "checkpoints" / "step_000000"


def trained(step: Path, data: Path, recipe: FineTune, state: Path | None = None) -> FrozenClassifier:
    run, _, towers = load_towers(step)
    index = torch.arange(40)
    train = Examples(data / "train", index, index % len(COLORS), "the colors")
    return fine_tune(towers, run, train, len(COLORS), recipe, device=CPU, state=state)


@pytest.mark.parametrize("name", FROZEN)
def test_a_head_learns_and_the_encoder_stays(name: str, step: Path, data: Path) -> None:
    run, _, towers = load_towers(step)
    before = {key: value.clone() for key, value in towers.state_dict().items()}
    train, heldout = (Examples(data / s, torch.arange(n)) for s, n in (("train", 40), ("heldout", 20)))
    recipe = replace(FROZEN[name], epochs=30, batch=8)
    model = fine_tune(towers, run, train, len(COLORS), recipe, device=CPU)
    predicted = predict(model, run, heldout, device=CPU)
    assert (predicted == torch.arange(20) % len(COLORS)).float().mean() > 0.7  # chance is a quarter
    assert all(torch.equal(value, before[key]) for key, value in towers.state_dict().items())


def test_the_paper_s_numbers() -> None:
    recipe = FROZEN["linear_paper"]
    assert (recipe.epochs, recipe.optimizer, recipe.peak(16_384), recipe.weight_decay) == (
        90,
        "lars",
        3.2,
        0.0,
    )
    assert recipe.warmup * recipe.epochs == pytest.approx(10) and recipe.batch_of(1_281_167) == 16_384
    assert recipe.peak(64) == 3.2 and recipe.batch_of(4000) == 250 and recipe.batch_of(41) == 32
    assert FineTune().batch_of(7) == 6


def test_without_crops_the_head_is_that_of_kept_features(
    step: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers = load_towers(step)[2]
    first = 0.01 * torch.randn(towers.encoder.width, len(COLORS), generator=torch.Generator().manual_seed(7))

    def same_start(weight: torch.Tensor, std: float, generator: torch.Generator | None = None) -> None:
        if weight.shape in (first.shape, first.T.shape):
            weight.data.copy_(first if weight.shape == first.shape else first.T)

    monkeypatch.setattr(torch.nn.init, "trunc_normal_", same_start)
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []
    loss = fine_tune_module._share_of_loss

    def seen(trained: object, inputs: Inputs, precision: torch.dtype) -> torch.Tensor:
        shown.append((inputs.values.clone(), inputs.targets.clone()))
        return loss(trained, inputs, precision)

    monkeypatch.setattr(fine_tune_module, "_share_of_loss", seen)
    whole = replace(
        FROZEN["linear_paper"], epochs=9, batch=40, batches=1, warmup=0.0, scale=(1.0, 1.0), flip=0.0
    )
    head = trained(step, data, whole).head[1]
    features, labels = shown[0]
    kept = LinearRecipe(epochs=9, warmup=0, batch=40, batches=1)
    expected = train_heads({"x": features}, labels, len(COLORS), [3.2], kept)[0]
    assert len(shown) == 9 and not torch.allclose(head.weight.T, first, atol=1e-4)
    torch.testing.assert_close(head.weight.T, expected.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.bias, expected.bias, rtol=1e-3, atol=1e-5)


def test_crops_differ_between_epochs_and_pieces_change_nothing(
    step: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(step, data, SHORT["linear_paper"]).head.state_dict()
    shown: list[torch.Tensor] = []
    features = FrozenClassifier.features
    monkeypatch.setattr(FrozenClassifier, "features", lambda *a: shown.append(a[1].clone()) or features(*a))
    monkeypatch.setattr(fine_tune_order, "READ_AT_ONCE", 5)
    in_parts = trained(step, data, SHORT["linear_paper"]).head.state_dict()
    assert all(torch.equal(whole[key], value) for key, value in in_parts.items())
    assert len(shown) == 4 and not torch.equal(shown[0], shown[1])
    monkeypatch.setattr(frozen, "AT_ONCE", 3)
    again = trained(step, data, SHORT["linear_paper"]).head.state_dict()
    assert all(torch.allclose(whole[key], value, atol=1e-5) for key, value in again.items())


def test_a_share_is_cut_into_almost_equal_pieces() -> None:
    assert [list(p) for p in in_pieces(range(7), 3)] == [[0, 1], [2, 3], [4, 5, 6]]


@pytest.mark.parametrize("name", FROZEN)
def test_an_interrupted_training_of_a_head_goes_on(
    name: str, step: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(step, data, SHORT[name]).head.state_dict()
    state = tmp_path / "state.pt"
    with monkeypatch.context() as broken:
        broken.setattr("pretrain.training_state.SAVE_SECONDS", -1.0)
        broken.setattr("pretrain.evaluate.fine_tune.LOOKED_AT", 1)
        calls, features = [], FrozenClassifier.features

        def failing(*arguments: object) -> torch.Tensor:
            calls.append(1)
            if len(calls) > 2:
                raise KeyboardInterrupt
            return features(*arguments)

        broken.setattr(FrozenClassifier, "features", failing)
        with pytest.raises(KeyboardInterrupt):
            trained(step, data, SHORT[name], state)
    assert state.stat().st_size < 2**20  # the head alone, not the encoder
    went_on = trained(step, data, SHORT[name], state).head.state_dict()
    assert all(torch.equal(whole[key], value) for key, value in went_on.items())


def test_standardises_as_torch_does() -> None:
    values = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    ours, theirs = Standardised(8), torch.nn.BatchNorm1d(8, eps=1e-6, affine=False)
    for batch in values:
        assert torch.allclose(ours(batch), theirs(batch), atol=1e-5)
    ours.eval(), theirs.eval()
    # torch's running variance is that over n - 1
    assert torch.allclose(ours(values[0]), theirs(values[0]), atol=0.05)


def test_rows_of_the_result(step: Path, data: Path) -> None:
    options = parse(["run", "--data", "d", "--probes", "knn,linear_paper,attentive_crops"])
    assert protocols_of(options).rows == ("knn", "linear_paper", "attentive_crops")
    everything = protocols_of(parse(["run", "--data", "d", "--probes", "all,linear_paper"]))
    assert "attentive" in everything.rows and "attentive_crops" not in everything.rows
    with pytest.raises(ValueError, match=r"heads \['linear_papers'\] are unknown; choose from"):
        Protocols(frozen=("linear_papers",))
    found = evaluate_checkpoint(
        step, data / "train", data / "heldout", Protocols(probes=("knn",), ks=(5,), frozen=("linear_paper",))
    )
    assert found["linear_paper"]["recipe"]["trains"] == LINEAR and found["linear_paper"]["n"] == 20
    assert found["linear_paper"]["train_images"] == 40


def test_a_head_takes_no_mixing() -> None:
    with pytest.raises(
        ValueError, match="takes crops, flips and RandAugment, not mixup, smoothing, head_rate"
    ):
        FineTune(trains=ATTENTIVE, mixup=0.8, head_rate=2.0)
    with pytest.raises(ValueError, match="trains='heads' must be one of"):
        FineTune(trains="heads")
