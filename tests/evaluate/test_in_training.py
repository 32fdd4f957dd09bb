"""Do two ranks under ZeRO-3 see in their teacher what its checkpoint gives, and train on as if they had not looked,
whatever becomes of the images?

`python test_in_training.py FOLDER DATA` is one rank of it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import torch

from pretrain.arguments import check_evaluation
from pretrain.checkpoint import load_towers
from pretrain.data.shards import ShardFolder
from pretrain.evaluate import zero_shot
from pretrain.evaluate.features import extract
from pretrain.evaluate.in_training import TeacherCheck
from pretrain.facts import DataFacts
from pretrain.recipes import load
from tests.engine.launch import start
from tests.fakes import FACTS, random_batch, shrink

FACTS_OF_COLORS = DataFacts(categories=("a", "b"), vocab_size=0)
STEPS = 3  # the disk of a rank fails while its teacher of the second is looked at
RUN = replace(shrink(load("m3i.vit_b16")), batch=4, steps=9)


class MeanColor:
    """An engine whose teacher sees the mean color."""

    dtype, device = torch.float32, torch.device("cpu")

    def ask_teacher(self, images: torch.Tensor, kinds: tuple[str, ...], summary: bool) -> dict:
        assert kinds == ("dense",) and not summary
        return {"dense": images.mean(dim=(2, 3))[:, None]}


def rank_main(folder: Path, data: Path) -> None:
    """Losses of the steps with and without looks between them; what the last look saw, and the checkpoint of it."""
    from pretrain import checkpoint, randomness
    from pretrain.collectives import rank
    from pretrain.distributed import start_distributed
    from tests.engine.test_rows_ranks import share
    from tests.engine.whole_engine import float32_engine

    start_distributed()
    facts = replace(FACTS, vocab_size=200)
    tokenizer = data / "train" / "tokenizer"
    curves, rows = [], []
    for looks in (False, True):
        engine = float32_engine(RUN, facts, "zero3", smooth=True)
        check = TeacherCheck(RUN, facts, data, tokenizer)
        curve = []
        for step in range(STEPS):
            losses = engine.step(share(random_batch(RUN, 4, seed=step)))
            curve.append(
                [float(nats).hex() for nats in losses.nats.values()] + [float(engine.grad_norm).hex()]
            )
            if looks:
                before = randomness.states()
                with failing_disk(is_failing=step == 1 and rank() == 1):
                    found = check(engine)
                assert randomness.states() == before
                rows.append(found)
        curves.append(curve)
    assert curves[0] == curves[1], curves
    seen, _ = check.features(engine, "heldout")
    checkpoint.Saver(engine, folder / "kept", facts, tokenizer).save(wait=True)
    if rank() == 0:
        torch.save(seen, folder / "seen.pt")
        (folder / "rows.json").write_text(json.dumps(rows))
    else:
        assert rows == [{}] * STEPS


@contextmanager
def failing_disk(is_failing: bool) -> Iterator[None]:
    """No sample of held-out images can be read on this rank, if it `is_failing`."""
    sample = ShardFolder.sample

    def failing(self: ShardFolder, index: int) -> dict[str, bytes]:
        if is_failing and self.folder.name == "heldout":
            raise OSError(errno.EIO, "the disk fails")
        return sample(self, index)

    ShardFolder.sample = failing
    try:
        yield
    finally:
        ShardFolder.sample = sample


def test_ranks_see_what_the_checkpoint_gives_and_train_on_undisturbed(data: Path, tmp_path: Path) -> None:
    codes, output = start(tmp_path, str(data), world=2, script=Path(__file__))
    assert codes == [0, 0], output
    run, _, towers = load_towers(tmp_path / "kept" / f"step_{STEPS:06d}")
    found = extract(towers, run, data / "heldout", device=torch.device("cpu"), workers=0, title="test")
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # every second image of a rank, its images in a row
    assert torch.equal(seen["labels"], found.labels[order])
    # Folded norms and other batches: sums in another order.
    torch.testing.assert_close(seen["tokens"], found.tokens[order], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen["projected"], found.projected[order], rtol=1e-3, atol=1e-4)
    before, lost, rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows["knn"]["n"] == rows["zero_shot"]["n"] == 20 and rows["knn"]["accuracy"] > 0.5
    assert rows.keys() == before.keys() == lost.keys()
    for row in lost.values():  # of one rank, told by all
        assert row["accuracy"] is None and "the disk fails" in row["reason"]


def test_unreadable_and_missing_images_are_passed_over(
    run_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = TeacherCheck(RUN, FACTS_OF_COLORS, data, None)
    pictures = check._pictures["train"]
    assert len(check.features(MeanColor(), "train")[0]["labels"]) == 40
    damaged = pictures.shards.sample(3)["png"]
    sample = ShardFolder.sample

    def broken(self: ShardFolder, index: int) -> dict[str, bytes]:
        members = sample(self, index)
        return members | {"png": b"no image"} if members["png"] == damaged else members

    monkeypatch.setattr(ShardFolder, "sample", broken)
    pictures.samples = [*pictures.samples, None]
    assert len(check.features(MeanColor(), "train")[0]["labels"]) == 39
    rows = check(MeanColor())
    assert list(rows) == ["knn"] and rows["knn"]["accuracy"] > 0.9
    assert rows["knn"]["dropped"] == {"train": {"not_an_image": 1}, "heldout": {}}


def test_a_set_that_is_damaged_between_two_looks_is_told_and_ends_nothing(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    check = TeacherCheck(RUN, FACTS_OF_COLORS, tmp_path / "data", None)
    assert check(MeanColor())["knn"]["accuracy"] > 0.9
    for shard in (tmp_path / "data" / "heldout").glob("*.tar"):
        os.truncate(shard, 100)
    row = check(MeanColor())["knn"]
    assert row["accuracy"] is None and "can be judged (truncated_shard 20)" in row["reason"]
    assert row["dropped"] == {"train": {}, "heldout": {"truncated_shard": 20}}


def test_features_that_are_not_finite_are_no_measurement(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = TeacherCheck(RUN, FACTS_OF_COLORS, data, None)
    sound = check(MeanColor())["knn"]

    def diverged(images: torch.Tensor, kinds: tuple[str, ...], summary: bool) -> dict:
        told = images.mean(dim=(2, 3))[:, None].clone()
        told[:: len(told) - 1] = float("nan")  # two of a batch
        others = told[:, 0].clone()
        others[1], others[0] = others[0], 0.0  # of another image
        return {"dense": told, "projected": others}

    teacher = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"), ask_teacher=diverged)
    row = check(teacher)["knn"]
    assert row["accuracy"] is None and row.keys() == {"accuracy", "reason", "dropped"}
    assert row["reason"].startswith(
        "the features of 3 of 40 train images are not finite, which nothing is told"
    )
    assert check(MeanColor())["knn"] == sound
    check._captions = SimpleNamespace(encode=None)
    classes = torch.eye(3)[:2].clone()
    monkeypatch.setattr(check, "_classes", lambda engine: classes)
    assert {one["reason"] for one in check(teacher).values()} == {row["reason"]}
    teacher.ask_teacher = lambda images, *_: {
        "dense": (m := images.mean(dim=(2, 3)))[:, None],
        "projected": m,
    }
    assert all(one["accuracy"] is not None for one in check(teacher).values())
    classes[1] = float("inf")
    rows = check(teacher)
    assert rows["knn"] == sound and rows["zero_shot"]["accuracy"] is None
    assert rows["zero_shot"]["reason"].startswith("the vectors of 1 of 2 categories are not finite")


def test_a_fault_of_the_model_is_no_fault_of_the_data(data: Path) -> None:
    check = TeacherCheck(RUN, FACTS_OF_COLORS, data, None)
    broken = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"), ask_teacher=lambda *_: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        check(broken)


def test_sets_without_labels_are_refused_before_the_training(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = ShardFolder.sample

    def unlabelled(self: ShardFolder, index: int) -> dict[str, bytes]:
        members = sample(self, index)
        return members if self.folder.name == "train" else {k: v for k, v in members.items() if k != "cls"}

    monkeypatch.setattr(ShardFolder, "sample", unlabelled)
    with pytest.raises(ValueError, match=r"none of the 20 images of .*heldout .* has a label: name another"):
        TeacherCheck(RUN, DataFacts(categories=("a", "b"), vocab_size=0), data, None)


def test_images_that_test_may_be_called_otherwise(data: Path, tmp_path: Path) -> None:
    facts = DataFacts(categories=("a", "b"), vocab_size=0)
    (tmp_path / "train").symlink_to(data / "train")
    with pytest.raises(FileNotFoundError, match=r"has no heldout/, val/, validation/, test/: `python -m"):
        check_evaluation(5, tmp_path)
    (tmp_path / "val").symlink_to(data / "heldout")
    check_evaluation(5, tmp_path)
    check = TeacherCheck(RUN, facts, tmp_path, None)
    assert check._pictures["heldout"].shards.folder == tmp_path / "val"


def test_imagenets_classes_get_their_templates(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip import IMAGENET_CLASSNAMES

    check = TeacherCheck(RUN, DataFacts(categories=("a", "b"), vocab_size=0), data, None)
    check.categories, check._captions = tuple(IMAGENET_CLASSNAMES), SimpleNamespace(encode=None)
    given = {}

    def vectors(names: tuple, encode: None, embed: object, templates: tuple) -> torch.Tensor:
        given.update(names=names, templates=templates)
        return torch.zeros(len(names), 2)

    monkeypatch.setattr(zero_shot, "class_vectors", vectors)
    check._classes(SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"), ask_teacher=print))
    assert given["names"] == check.categories and len(given["templates"]) == 80


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
