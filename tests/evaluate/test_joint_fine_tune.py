"""Do two ranks fine-tune as one does, and does an interrupted fine-tuning go on as if it had not been?"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import fsspec
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import training_state
from pretrain.checkpoint import PLACE_RECORD, load_towers
from pretrain.collectives import rank
from pretrain.data.faults import DataError
from pretrain.evaluate import checkpoints, fine_tune_order, fine_tune_state
from pretrain.evaluate import fine_tune as tuning
from pretrain.evaluate.evaluation import evaluate
from pretrain.evaluate.fine_tune import UNREAD, Classifier, fine_tune, predict
from pretrain.evaluate.fine_tune_order import Examples, own_pairs
from pretrain.evaluate.fine_tune_precision import obstacle_to_bfloat16
from pretrain.evaluate.fine_tune_recipes import FROZEN, FineTune
from pretrain.evaluate.sets import sha256_of
from pretrain.facts import DataFacts
from pretrain.intact import files_in
from pretrain.recipes import load
from tests.engine.launch import start
from tests.evaluate.runs import write_run
from tests.evaluate.sets import COLORS, write_set
from tests.evaluate.test_evaluate import damage
from tests.fakes import shrink

CPU = torch.device("cpu")
# Five pairs of images a step, which two ranks cannot share evenly; four steps an epoch.
RECIPE = FineTune(
    epochs=2, batch=10, mixup=0.8, cutmix=1.0, erasing=0.5, rand_augment="rand-m9-mstd0.5-inc1", base_lr=1e-2
)
HEADS = {name: replace(recipe, epochs=2, batch=10) for name, recipe in FROZEN.items()}
STOPPED = 6  # steps: in the second epoch


class Stopped(Exception):
    """On all ranks at the same step, as if their processes ended."""


@contextmanager
def stopping(after: int) -> Iterator[None]:
    """Training saves its state at every step and ends before step `after`."""
    schedule, looked, seconds = tuning.warm_cosine, tuning.LOOKED_AT, training_state.SAVE_SECONDS

    def rate(step: int, *others: object) -> float:
        if step == after:
            raise Stopped
        return schedule(step, *others)

    tuning.warm_cosine, tuning.LOOKED_AT, training_state.SAVE_SECONDS = rate, 1, -1.0
    try:
        yield
    except Stopped:
        pass
    finally:
        tuning.warm_cosine, tuning.LOOKED_AT, training_state.SAVE_SECONDS = schedule, looked, seconds


def tuned(step: Path, data: Path, state: Path | None = None, recipe: FineTune = RECIPE) -> dict[str, Tensor]:
    """Weights after the recipe, and what they say of the held-out images."""
    run, _, towers = load_towers(step)
    train, heldout = (examples_of(data / split, n) for split, n in (("train", 40), ("heldout", 20)))
    model = fine_tune(towers, run, train, len(COLORS), recipe, device=CPU, state=state)
    return model.state_dict() | {"predicted": predict(model, run, heldout, device=CPU)}


def examples_of(folder: Path, count: int) -> Examples:
    """The first ones of a set."""
    index = torch.arange(count)
    return Examples(folder, index, index % len(COLORS), sha256_of(folder))


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = DataFacts(categories=tuple(COLORS), vocab_size=0)
    run = write_run(tmp_path_factory.mktemp("vit"), shrink(load("m3i.vit_b16")), facts, steps=(0,))
    return run / "checkpoints" / "step_000000"


def test_two_ranks_are_one_and_go_on_where_they_were_stopped(step: Path, data: Path, tmp_path: Path) -> None:
    codes, output = start(tmp_path, "tune", str(step), str(data), world=2, script=Path(__file__))
    assert codes == [0, 0], output
    assert [path.name for path in tmp_path.glob("copied_by_*")] == ["copied_by_0"]
    two, resumed = (torch.load(tmp_path / f"{name}.pt") for name in ("straight", "resumed"))
    assert all(torch.equal(value, resumed[name]) for name, value in two.items())
    one = tuned(step, data)
    with stopping(STOPPED):
        tuned(step, data, tmp_path / "one.pt")
    states = [torch.load(tmp_path / f"{name}.pt") for name in ("one", "stopped")]
    assert states[0]["step"] == states[1]["step"] == STOPPED
    # The losses of the steps since the epoch began; float32 sums in another order, and what AdamW makes of that.
    assert states[0]["more"]["total"] == pytest.approx(states[1]["more"]["total"], rel=1e-4)
    heads = torch.load(tmp_path / "heads.pt")
    for name, recipe in HEADS.items():
        alone = tuned(step, data, recipe=recipe)
        assert apart(heads[name], alone) < 1e-3 and torch.equal(heads[name]["predicted"], alone["predicted"])
    on_one = tuned(step, data, tmp_path / "stopped.pt")  # by one rank, what two began
    for other in (two, on_one):
        assert (other["predicted"] == one["predicted"]).float().mean() >= 0.9
        assert apart(other, one) < 1e-2 < apart(load_towers(step)[2].encoder.state_dict(), one, "encoder.")


def apart(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str = "") -> float:
    """Relative distance of all weights."""
    pairs = [(v, expected[f"{prefix}{n}"]) for n, v in found.items() if v.is_floating_point()]
    return (
        float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5
    )


def test_a_state_of_another_training_is_refused(
    step: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "a" / "state.pt"
    with stopping(1):
        tuned(step, data, state)
    run, _, towers = load_towers(step)
    whole = examples_of(data / "train", 40)
    for examples, recipe, told in (
        (examples_of(data / "train", 30), RECIPE, "with images="),
        (whole, replace(RECIPE, mixup=0.0), "with recipe="),
        (replace(whole, labels=whole.labels.flip(0)), RECIPE, "with labels="),
        (replace(whole, sha256="another"), RECIPE, "with data=.*'sha256': 'another'"),
    ):
        with pytest.raises(ValueError, match=f"is the state of a fine-tuning {told}.*name another --out"):
            fine_tune(towers, run, examples, len(COLORS), recipe, device=CPU, state=state)
    with monkeypatch.context() as changed:
        changed.setattr(tuning, "precision_of", lambda *_: torch.bfloat16)
        with pytest.raises(ValueError, match="with precision='float32', not 'bfloat16'"):
            tuned(step, data, state)
    kept = state.rename(state.with_name("fine_tune_0.pt"))
    same, own = (
        fine_tune_state.require_same_trainings,
        fine_tune_state.data_settings(whole.folder, whole.sha256),
    )
    same(tmp_path, {"fine_tune": replace(RECIPE, seed=2)}, own)
    same(tmp_path, {"linear_paper": replace(RECIPE, epochs=9)}, own | {"sha256": "another"})
    with pytest.raises(ValueError, match="is the state of a fine-tuning with epochs=2, not 9"):
        same(tmp_path, {"fine_tune": replace(RECIPE, epochs=9)}, own)
    with pytest.raises(
        ValueError, match=r"is the state of a fine-tuning with data=.*not .*another.*delete it"
    ):
        same(tmp_path, {"fine_tune": RECIPE}, own | {"sha256": "another"})
    fine_tune_state.remove_states(tmp_path, {"linear_paper"})
    kept.rename(state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is no sound state of a fine-tuning .*delete it"):
        tuned(step, data, state)
    other = state.with_name("linear_paper_0.pt")
    state.rename(state.with_name("fine_tune_0.pt"))
    other.touch()
    fine_tune_state.remove_states(tmp_path, {"fine_tune"})
    assert [path.name for path in tmp_path.rglob("*.pt")] == [other.name]
    fine_tune_state.remove_states(tmp_path / "a", {"linear_paper"})
    assert not (tmp_path / "a").exists()


def test_a_fine_tuning_does_not_go_on_with_data_that_were_built_anew(step: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_set(data / "train", "train", 10)
    write_set(data / "heldout", "heldout", 5, seed=1)
    command = [str(step), "--data", str(data), "--probes", "knn", "--fine-tune", "2", "--out"]
    with stopping(1):
        evaluate([*command, str(tmp_path / "result.json")])
    assert len(list(tmp_path.rglob("fine_tune_0.pt"))) == 1
    shutil.rmtree(data / "train")
    write_set(data / "train", "train", 10, seed=2)
    with pytest.raises(
        ValueError, match=r"with data=.*not .* \(differing: \['data'\]\): .* delete it, or name"
    ):
        evaluate([*command, str(tmp_path / "result.json")])
    evaluated = evaluate([*command, str(tmp_path / "other.json")])
    assert evaluated["data"]["train"]["sha256"] == sha256_of(data / "train")


def test_an_encoder_that_does_not_bear_bfloat16_is_told(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, towers = load_towers(step)
    model = Classifier(towers.encoder, 4)
    assert obstacle_to_bfloat16(model, run.views.size, CPU) == ""
    assert all(parameter.grad is None for parameter in model.parameters())
    forward = model.encoder.forward

    def failing(images: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("expected one dtype\nof all")
        return forward(images)

    def doubled(images: Tensor) -> Tensor:
        return (1 + torch.is_autocast_enabled("cpu")) * forward(images)

    for changed, told in (
        (failing, "the encoder fails (RuntimeError: expected one dtype)"),
        (doubled, "% apart"),
    ):
        monkeypatch.setattr(model.encoder, "forward", changed)
        assert told in obstacle_to_bfloat16(model, run.views.size, CPU)


def test_pairs_of_a_batch_are_shared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    order, seen = list(range(10)), []
    monkeypatch.setattr(fine_tune_order, "world_size", lambda: 7)
    for number in range(7):  # more than pairs
        monkeypatch.setattr(fine_tune_order, "rank", lambda: number)  # noqa: B023  called at once
        own, counts = own_pairs(order)
        assert [a + b for a, b in zip(own, reversed(own), strict=True)] == [9] * len(own) != []
        seen += own if counts else []
    assert sorted(seen) == order


def test_an_image_that_fails_later_is_left_out_and_wrong(step: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "heldout", tmp_path / "data")
    damage(tmp_path / "data", 3)
    run, _, towers = load_towers(step)
    examples = Examples(tmp_path / "data", torch.arange(20))
    recipe = FineTune(epochs=1, batch=10)
    tolerant = replace(run, max_bad=0.5)
    model = fine_tune(towers, tolerant, examples, len(COLORS), recipe, device=CPU)
    predicted = predict(model, tolerant, examples, device=CPU)
    assert (predicted == UNREAD).nonzero().tolist() == [[3]]
    with pytest.raises(DataError, match="samples read so far are bad"):
        fine_tune(towers, replace(run, max_bad=0.0), examples, len(COLORS), recipe, device=CPU)


def found_behind_a_url(step: Path, folder: Path) -> Path:
    """The checkpoint of a run of `folder` that is kept in a store, found by all ranks at once."""
    memory, own = fsspec.filesystem("memory"), folder / "run"
    for name in files_in(step):
        memory.pipe_file(f"/bucket/vit/{step.name}/{name}", (step / name).read_bytes())
    own.mkdir(exist_ok=True)
    if rank() == 0:
        (own / PLACE_RECORD).write_text('{"checkpoints": "memory://bucket/vit"}')
    dist.barrier()  # nobody reads it half written
    copy = checkpoints.fetched

    def copied(*arguments: Any) -> Path:
        (folder / f"copied_by_{rank()}").touch()
        return copy(*arguments)

    checkpoints.fetched = copied
    return checkpoints.find_checkpoint(own, "last")


def scenario(folder: Path, name: str, *places: str) -> None:
    step, data = map(Path, places)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found = found_behind_a_url(step, folder)
    assert files_in(found / "teacher") == ["COMPLETE", *files_in(step / "teacher")]
    straight = tuned(step, data)
    with stopping(STOPPED):
        tuned(step, data, folder / "state.pt")
    if rank() == 0:
        shutil.copy(folder / "state.pt", folder / "stopped.pt")
    resumed = tuned(step, data, folder / "state.pt")
    heads = {name: tuned(step, data, recipe=recipe) for name, recipe in HEADS.items()}
    if rank() == 0:
        torch.save(heads, folder / "heads.pt")
        torch.save(straight, folder / "straight.pt")
        torch.save(resumed, folder / "resumed.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    scenario(Path(sys.argv[1]), *sys.argv[2:])
