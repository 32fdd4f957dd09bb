"""Do two ranks show, learn and find what one does?

As a script, one rank of it: `python test_ranks.py FOLDER RUN SHARDS COCO`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

from pretrain import training_state  # noqa: E402
from pretrain.collectives import average_gradients, mean_over_ranks, on_every_rank, rank  # noqa: E402
from pretrain.data.faults import BadSample  # noqa: E402
from pretrain.evaluate.checkpoints import find_checkpoint  # noqa: E402
from pretrain.evaluate.evaluation import evaluate  # noqa: E402
from pretrain.ranks import exit_code_of_ranks  # noqa: E402
from pretrain.training_state import States  # noqa: E402
from pretrain.transfer import __main__ as command  # noqa: E402
from pretrain.transfer.backbone import load_trunk  # noqa: E402
from pretrain.transfer.joint import with_joint_norms  # noqa: E402
from pretrain.transfer.order import Draws, batches  # noqa: E402
from pretrain.transfer.places import Named, open_sets  # noqa: E402
from pretrain.transfer.pretrained import open_pretrained  # noqa: E402
from pretrain.transfer.recipes import RECIPES, Detect, Optimisation, Segment, recipe  # noqa: E402
from pretrain.transfer.things import Things  # noqa: E402
from pretrain.transfer.training import STATE  # noqa: E402
from pretrain.transfer.work import DETECTIONS, RESULT, TASKS, TESTS  # noqa: E402
from tests.engine.launch import start  # noqa: E402
from tests.evaluate.test_joint_fine_tune import found_behind_a_url  # noqa: E402

# pycocotools (https://github.com/ppwwyyxx/cocoapi) hands arrays to numpy in a way that is to end.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FAMILY = "vit"
TOY = Optimisation(steps=3, batch=4, lr=1e-3, warmup=0)
BAD = (2, 3, 9)  # examples that cannot be used


def tiny(task: str, name: str) -> Segment | Detect:
    """A batch of four, without what is drawn anew on each rank: paths that are dropped, noisy queries."""
    numbers = recipe(task, name)
    optimisation = replace(numbers.optimisation, steps=2, batch=4, warmup=1, drop_path=0.0)
    small = replace(numbers, size=32, optimisation=optimisation)
    if isinstance(small, Segment):
        return small
    more = {"num_denoising": 0} if small.head == "rt_detr" else {"box_score_thresh": 0.0}
    return replace(small, detections=8, options={**small.options, **more})


def shown(steps: int = 3) -> list[list[int]]:
    """The examples of each step on this rank, and how many were left out until then on all."""

    def draw(index: int) -> int:
        if index in BAD:
            raise BadSample("unreadable", str(index))
        return index

    found, num_dropped = [], 0
    for batch in batches(Draws(10, draw, 0), replace(TOY, steps=steps), 0, 0):
        num_dropped += len(batch.dropped)
        found.append([*batch.examples, num_dropped])
    return found


def gradients(run: Path, shards: Path, task: str, name: str) -> dict[str, Any]:
    """Loss and averaged gradients of the first four examples, shared by the ranks, and what norms remember."""
    pretrained = open_pretrained(find_checkpoint(run, "last"))
    train_set, _ = open_sets(task, Named(shards), 0.0)
    numbers = tiny(task, name)
    torch.manual_seed(0)
    model, draw, loss_of = TASKS[task](pretrained, numbers, train_set)
    load_trunk(model, pretrained.encoder, is_frozen=False)
    with_joint_norms(model, torch.device("cpu"))
    if name == "small_detr":  # many norms in a row make of single precision's rounding more than is compared
        model.double()
        model.net.register_forward_pre_hook(in_double, with_kwargs=True)
    (batch,) = batches(Draws(len(train_set), draw, 0), replace(TOY, steps=1), 0, 0)
    if task == "detect" and rank() == 0:  # more boxes than the other rank has
        first, *others = batch.examples
        boxes = torch.cat([first.things.boxes, torch.tensor([[2.0, 3, 20, 25], [9, 1, 30, 14]])])
        labels = torch.cat([first.things.labels, torch.tensor([0, 1])])
        batch.examples[:] = [replace(first, things=Things(boxes, labels, None, None)), *others]
    loss = loss_of(model.train(), batch.examples)
    loss.backward()
    average_gradients(model.parameters())
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": mean_over_ranks(loss), **found, **dict(model.named_buffers())}


def in_double(module: torch.nn.Module, given: Any, named: Any) -> tuple[Any, Any]:
    """All numbers with a fraction that a network is given, in double precision."""
    return tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (given, named))


def failing() -> None:
    """One rank alone cannot read."""
    if rank() == 1:
        raise OSError("the disk of rank 1 is gone")


def message(work: Callable[[], Any]) -> str:
    try:
        work()
    except (OSError, ValueError) as error:
        return str(error)
    return "nothing"


def arguments(task: str, run: Path, data: Path, out: Path) -> list[str]:
    return [task, str(run), "--data", str(data), "--out", str(out)]


def scenarios(given: list[str] | None) -> None:
    """What one of two ranks does; FOLDER/rankN.json and .pt tell it."""
    assert given is not None
    folder, run, shards, coco = map(Path, given)
    told: dict[str, Any] = {"shown": shown()}
    told["failed"] = message(lambda: on_every_rank(failing))
    told["odd"] = message(lambda: list(batches(Draws(10, int, 0), replace(TOY, batch=3), 0, 0)))
    found_behind_a_url(find_checkpoint(run, "last"), folder)
    # Rank 1 alone is told what it cannot do, and the other does not wait for it in the fetch of the checkpoint.
    wrong = ["--workers", "-1"] if rank() == 1 else []
    asked = [str(folder / "run"), "--data", str(shards), *wrong]
    told["alone"] = [
        message(lambda: command.run(["segment", *asked])),
        message(lambda: evaluate(asked)),
    ]
    kept = {name: gradients(run, shards, task, name) for task, name in LEARNT}
    command.run(arguments("segment", run, shards, folder / "segment"))
    of_rank_0 = command.run([*arguments("detect", run, coco, folder / "detect"), "--frozen"])
    told["has_result"] = of_rank_0 is not None
    (folder / f"rank{rank()}.json").write_text(json.dumps(told))
    torch.save({"gradients": kept, "detector": WEIGHTS}, folder / f"rank{rank()}.pt")
    if rank() == 1:
        raise ValueError("rank 1 has a problem of its own")


LEARNT = [("segment", "small"), ("detect", "small_detr")]
SMALL = {task: tiny(task, "small") for task in RECIPES}
WEIGHTS: dict[str, torch.Tensor] = {}  # of the detector, at its test


def remember(find: Callable[..., Any], model: torch.nn.Module, *others: Any) -> Any:
    """`find`, which also keeps the weights it finds with."""
    WEIGHTS.update(model.state_dict())
    return find(model, *others)


def as_lvis(path: Path) -> None:
    """The fields of LVIS, in a file of squares."""
    content = json.loads(path.read_text())
    for image in content["images"]:
        image |= {"neg_category_ids": [10, 20], "not_exhaustive_category_ids": []}
    for category in content["categories"]:
        category["frequency"] = "f"
    path.write_text(json.dumps(content))


def test_two_ranks_train_and_test_as_one(
    runs: dict[str, Path], shards: Path, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task, numbers in SMALL.items():
        monkeypatch.setitem(RECIPES[task], "small", partial(replace, numbers))
    for split in ("train", "val"):
        as_lvis(coco / "annotations" / f"instances_{split}.json")
    run = runs[FAMILY]
    straight = command.run(arguments("segment", run, shards, tmp_path / "straight"))
    stop_after_one_step(arguments("segment", run, shards, tmp_path / "segment"), monkeypatch)

    codes, output = start(tmp_path, *map(str, (run, shards, coco)), world=2, script=Path(__file__))
    assert codes == [0, 1], output
    assert output.count("rank 1: error: rank 1 has a problem of its own") == 1, output
    assert output.count("AP of LVIS") == 2, "rank 0 alone prints box and mask AP"
    told = [json.loads((tmp_path / f"rank{number}.json").read_text()) for number in (0, 1)]
    kept = [torch.load(tmp_path / f"rank{number}.pt", weights_only=True) for number in (0, 1)]

    for alone, *pair in zip(shown(), told[0]["shown"], told[1]["shown"], strict=True):
        assert pair[0][:-1] + pair[1][:-1] == alone[:-1]
        assert pair[0][-1] == pair[1][-1] == alone[-1]
    assert {one["failed"] for one in told} == {"the disk of rank 1 is gone"}
    assert all("start one of [1, 3] ranks" in one["odd"] for one in told)
    assert all("--workers -1 must not be negative" in one for rank in told for one in rank["alone"])
    assert [one["has_result"] for one in told] == [True, False]

    for task, name in LEARNT:
        alone = gradients(run, shards, task, name)
        found = kept[0]["gradients"][name]
        assert alone.keys() == found.keys() and alone["loss"] > 0
        largest = max(float(value.abs().max()) for key, value in alone.items() if key != "loss")
        for key, value in alone.items():  # sums in another order, of numbers up to the largest
            assert torch.allclose(value.float(), found[key].float(), rtol=1e-3, atol=1e-5 * largest), key
            assert torch.equal(found[key], kept[1]["gradients"][name][key])

    together = json.loads((tmp_path / "segment" / RESULT).read_text())
    assert straight is not None and (straight["ranks"], together["ranks"]) == (1, 2)
    states = [torch.load(tmp_path / out / STATE, weights_only=True) for out in ("straight", "segment")]
    differences = torch.cat(
        [(w - states[1]["model"][key]).float().abs().flatten() for key, w in states[0]["model"].items()]
    )
    # Adam steps by the rate whatever the size of a gradient, so one that is all rounding may go either way.
    rate = SMALL["segment"].optimisation.lr
    assert (
        states[1]["step"] == 2 and differences.quantile(0.99) < 0.01 * rate and differences.max() < 3 * rate
    )

    assert kept[0]["detector"].keys() == kept[1]["detector"].keys() != set()
    assert all(torch.equal(w, kept[1]["detector"][key]) for key, w in kept[0]["detector"].items())
    shutil.copytree(tmp_path / "detect", tmp_path / "tested")
    (tmp_path / "tested" / RESULT).unlink()
    alone = command.run([*arguments("detect", run, coco, tmp_path / "tested"), "--frozen"])
    together = json.loads((tmp_path / "detect" / RESULT).read_text())
    for kind in ("box", "mask"):
        scores = [result["scores"][kind] for result in (alone, together)]
        assert "LVIS" in scores[0]["measure"] and scores[0]["n"] == scores[1]["n"] == 4
        assert scores[0]["AR300"] == pytest.approx(scores[1]["AR300"], abs=0.01)
    found = [json.loads((tmp_path / out / DETECTIONS).read_text()) for out in ("detect", "tested")]
    assert len(found[0]) == len(found[1]) > 0
    for one, other in zip(*found, strict=True):
        assert one["image_id"] == other["image_id"] and one["category_id"] == other["category_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.02)


def stop_after_one_step(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the state of one step of one rank."""

    def stop(*state: Any) -> None:
        save(*state)
        raise KeyboardInterrupt

    save = States.save
    with monkeypatch.context() as changed:
        changed.setattr(training_state, "SAVE_SECONDS", -1.0)
        changed.setattr(States, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            command.run(given)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for task, numbers in SMALL.items():
        RECIPES[task]["small"] = partial(replace, numbers)
    TESTS["detect"] = partial(remember, TESTS["detect"])
    sys.exit(exit_code_of_ranks(scenarios, sys.argv[1:], "nothing", timedelta(minutes=5)))
