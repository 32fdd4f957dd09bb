"""How are a thousand categories learned of which most are unknown in an image? Each by itself, few at a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

POWER = 0.5  # of a category's images, to which the chance of being judged is proportional
LEAST_SIDE = 0.01  # pixels of a box that is found, as torchvision has it


class FederatedHeads(RoIHeads):
    """torchvision's heads with a sigmoid for every category, trained by the federated loss.

    A step judges the categories of its things and others up to `judged`, drawn by the square root of how many images
    show them; of what it does not judge it learns nothing. Sources: arXiv 2103.07461 (federated loss), and ViTDet's
    configuration of LVIS in detectron2 (`use_fed_loss`, `use_sigmoid_ce`), whose head also has an output for the
    background that nothing reads.
    """

    def __init__(self, plain: RoIHeads, counts: Float[Tensor, " categories"], judged: int) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(plain))  # its parts and numbers
        self.judged = judged
        self.register_buffer("chance", counts**POWER, persistent=False)
        self.box_predictor.register_forward_hook(self._keep_logits)
        self._logits, self._labels = torch.empty(0), torch.empty(0)

    def _keep_logits(self, module: nn.Module, inputs: Any, found: tuple[Tensor, Tensor]) -> None:
        self._logits = found[0]

    def select_training_samples(self, proposals: Any, targets: Any) -> tuple[Any, ...]:
        chosen = super().select_training_samples(proposals, targets)
        self._labels = torch.cat(chosen[2])
        return chosen

    def forward(
        self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None
    ) -> tuple[Any, Any]:
        found, losses = super().forward(features, proposals, image_shapes, targets)
        if self.training:
            losses["loss_classifier"] = federated_loss(self._logits, self._labels, self.chance, self.judged)
        self._logits = self._labels = torch.empty(0)  # with their graph
        return found, losses

    def postprocess_detections(
        self,
        class_logits: Float[Tensor, "n outputs"],
        box_regression: Float[Tensor, "n numbers"],
        proposals: list[Float[Tensor, "_ 4"]],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, scores and labels of each image, by torchvision's rules."""
        numbers = [len(boxes) for boxes in proposals]
        boxes_of = self.box_coder.decode(box_regression, proposals)[:, 1:].split(numbers)
        scores_of = class_logits[:, 1:].sigmoid().split(numbers)
        kept = []
        for boxes, scores, shape in zip(boxes_of, scores_of, image_shapes, strict=True):
            row, category = torch.where(scores > self.score_thresh)
            some = clip_boxes_to_image(boxes[row, category], shape)
            large = remove_small_boxes(some, LEAST_SIDE)
            some, sure, labels = some[large], scores[row, category][large], category[large] + 1
            best = batched_nms(some, sure, labels, self.nms_thresh)[: self.detections_per_img]
            kept.append((some[best], sure[best], labels[best]))
        boxes, scores, labels = zip(*kept, strict=True)
        return list(boxes), list(scores), list(labels)


def federated_loss(
    logits: Float[Tensor, "n outputs"],
    labels: Int[Tensor, " n"],
    chance: Float[Tensor, " categories"],
    judged: int,
) -> Float[Tensor, ""]:
    """Binary cross-entropy summed over the judged categories, mean over the proposals, nats.

    `labels`: 0 for the background, else a category's number + 1, as the outputs are ordered.
    """
    here = labels[labels > 0].unique() - 1
    others = chance.scatter(0, here, 0.0)
    more = min(judged - len(here), int(others.count_nonzero()))
    chosen = torch.cat([here, others.multinomial(more)]) if more > 0 else here
    truth = labels[:, None] == chosen + 1
    losses = F.binary_cross_entropy_with_logits(
        logits[:, chosen + 1], truth.to(logits.dtype), reduction="sum"
    )
    return losses / max(len(labels), 1)


def image_counts(shown: Sequence[Collection[int]], num_classes: int) -> Float[Tensor, " num_classes"]:
    """How many of the examples show each class."""
    counts = Counter(name for classes in shown for name in classes)
    return torch.tensor([float(counts[number]) for number in range(num_classes)])
