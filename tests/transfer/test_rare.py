"""Are rare categories shown more often, and judged as LVIS's loss judges them?"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.transfer.coco import CocoSet
from pretrain.transfer.federated_heads import FederatedHeads, federated_loss, image_counts
from pretrain.transfer.masked_shards import MaskedShards
from pretrain.transfer.order import Draws, repeat_factors
from pretrain.transfer.recipes import recipe
from pretrain.transfer.training import Machine
from pretrain.transfer.work import Work, transfer

# pycocotools (https://github.com/ppwwyyxx/cocoapi) hands arrays to numpy in a way that is to end.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_an_image_is_repeated_for_the_rarest_of_its_classes() -> None:
    shown = [{0}, {0, 1}, {0}, {0, 2}, set()] * 20
    shown[7] = {0, 3}
    factors = repeat_factors(shown, 0.09)
    assert factors[0] == factors[4] == 1  # 79 of 100 images show class 0, and an image may show nothing
    assert factors[7] == pytest.approx(3)  # one of 100: sqrt(0.09 / 0.01)
    assert factors.max() == factors[7]


def test_epochs_are_equally_long_and_show_examples_as_often_as_asked() -> None:
    repeats = torch.tensor(
        [1.0, 1.0, 2.5, 1.25, 4.0], dtype=torch.float64
    )  # of 9.75 examples, so 10 are shown
    draws, asked = Draws(5, lambda index: index, 3, repeats), (repeats * 10 / 9.75).tolist()
    assert draws.length == 10
    total: Counter[int] = Counter()
    for epoch in range(400):
        seen = Counter(draws[10 * epoch + place] for place in range(10))
        assert all(abs(seen[index] - often) < 1 for index, often in enumerate(asked))
        total += seen
    assert [total[index] / 400 for index in range(5)] == pytest.approx(asked, rel=0.03)
    again = Draws(5, lambda index: index, 3, repeats)
    assert [again[place] for place in (3999, 17, 18)] == [draws[place] for place in (3999, 17, 18)]
    assert [draws[place] for place in range(10)] != [draws[place] for place in range(10, 20)]


def test_only_judged_categories_learn() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 9, requires_grad=True)  # background and 8 categories
    labels = torch.tensor([0, 3, 3, 0, 8, 0])
    chance = torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 1])  # 4 and 5 are shown by no image
    (gradient,) = torch.autograd.grad(federated_loss(logits, labels, chance, judged=4), logits)
    learned = gradient.abs().sum(0).nonzero().flatten().tolist()
    assert len(learned) == 4 and {3, 8} <= set(learned) and not {0, 5, 6} & set(learned)
    everything = federated_loss(logits, labels, chance, judged=50)
    known = [1, 2, 3, 4, 7, 8]
    truth = F.one_hot(labels, 9)[:, known].float()
    expected = F.binary_cross_entropy_with_logits(logits[:, known], truth, reduction="none").sum(1).mean()
    torch.testing.assert_close(everything, expected)


def test_categories_of_many_images_are_judged_more_often() -> None:
    chance = torch.tensor([100.0, 4.0, 0.0]).sqrt()  # the last is the thing's own
    labels, drawn = torch.tensor([3]), Counter()
    for _ in range(600):
        logits = torch.zeros(1, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(federated_loss(logits, labels, chance, judged=2), logits)
        drawn.update(gradient[0].nonzero().flatten().tolist())
    assert drawn[3] == 600 and drawn[1] + drawn[2] == 600
    assert drawn[1] / 600 == pytest.approx(10 / 12, abs=0.06)


def heads(num_classes: int) -> RoIHeads:
    predictor = FastRCNNPredictor(4, num_classes + 1)
    return RoIHeads(None, None, predictor, 0.5, 0.5, 16, 0.25, None, 0.3, 0.5, 5)


def test_boxes_are_found_by_the_rules_of_torchvision() -> None:
    """Of one category beside a background of logit 0, a softmax is the sigmoid."""
    torch.manual_seed(0)
    plain = heads(1)
    found = FederatedHeads(heads(1), torch.ones(1), 1)
    corners = 40 * torch.rand(30, 2)
    boxes = [torch.cat([part, part + 5 + 15 * torch.rand_like(part)], 1) for part in corners.split([18, 12])]
    logits = torch.stack([torch.zeros(30), 2 * torch.randn(30)], 1)
    moves, shapes = torch.randn(30, 8) / 4, [(48, 50), (44, 60)]
    expected = plain.postprocess_detections(logits, moves, boxes, shapes)
    for ours, theirs in zip(
        found.postprocess_detections(logits, moves, boxes, shapes), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert all(0 < len(one) <= 5 for one in expected[0])


def test_the_recipe_of_lvis_trains_and_asks_for_its_categories(
    runs: dict[str, Path], coco: Path, shards: Path, tmp_path: Path
) -> None:
    sets = [
        CocoSet(coco / "annotations" / f"instances_{split}.json", coco / "images", 0.0)
        for split in ("train", "val")
    ]
    assert image_counts(sets[0].shown, 2).tolist() == [2, 2]
    numbers = recipe("detect", "lvis")
    options = numbers.options | {"representation": 16, "box_batch_size_per_image": 8, "box_score_thresh": 0.0}
    optimisation = replace(numbers.optimisation, steps=2, batch=2, warmup=1)
    small = replace(numbers, size=32, width=32, options=options, optimisation=optimisation, detections=5)
    work = Work(find_checkpoint(runs["vit"], "last"), small, "lvis", tmp_path / "out")
    result = transfer(work, *sets, Machine(torch.device("cpu")))
    assert result is not None and result["scores"]["box"]["n"] == 4
    detections = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert 0 < len(detections) <= 20 and {one["category_id"] for one in detections} <= {10, 20}
    scenes = MaskedShards(shards / "train", with_ground=False)
    with pytest.raises(ValueError, match=r"lists the classes of its images.*take --recipe coco"):
        transfer(replace(work, out=tmp_path / "other"), scenes, scenes, Machine(torch.device("cpu")))
