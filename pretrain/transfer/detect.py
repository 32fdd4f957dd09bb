"""How well does a backbone with a detector find and outline things?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pycocotools import mask as rle
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from pretrain.transfer.average_precision import average_precision, truth_of
from pretrain.transfer.coco import compressed, outline_of
from pretrain.transfer.examples import AnnotatedSet, Example
from pretrain.transfer.federated import federated_precision
from pretrain.transfer.mask_rcnn import MaskRCNNHead
from pretrain.transfer.pretrained import Pretrained
from pretrain.transfer.recipes import Detect
from pretrain.transfer.rt_detr import RTDetrHead
from pretrain.transfer.things import Shown, Things

# Each has `loss(shown)`, and `find(images)`: uint8 of any sizes -> things in the pixels of the images.
HEADS: dict[str, Callable[[Pretrained, Detect, AnnotatedSet], nn.Module]] = {
    "mask_rcnn": MaskRCNNHead,
    "rt_detr": RTDetrHead,
}


def loss_of(model: nn.Module, shown: list[Shown]) -> Float[Tensor, ""]:
    """What `train` asks for."""
    return model.loss(shown)


@dataclass(frozen=True)
class Draw:
    """An example's canvas for training: large-scale jitter, arXiv 2012.07177, and a mirror."""

    examples: AnnotatedSet
    recipe: Detect

    def __call__(self, index: int) -> Shown:
        """Draws from torch's global generator, as torchvision does."""
        example = self.examples.example(index)
        things = things_of(example, self.examples)
        side = (self.recipe.size, self.recipe.size)
        change = v2.Compose(
            [
                v2.ScaleJitter(side, self.recipe.scales, antialias=True),
                v2.RandomCrop(side, pad_if_needed=True, fill={tv_tensors.Mask: 0, tv_tensors.Image: 0}),
                v2.RandomHorizontalFlip(self.recipe.flip),
                v2.SanitizeBoundingBoxes(min_size=1.0, labels_getter=_of_each_box),
            ]
        )
        size = tuple(example.image.shape[1:])
        target = {"boxes": tv_tensors.BoundingBoxes(things.boxes, format="XYXY", canvas_size=size)}
        target["labels"] = things.labels
        if things.masks is not None:
            target["masks"] = tv_tensors.Mask(things.masks)
        image, target = change(tv_tensors.Image(example.image), target)
        masks = target["masks"].as_subclass(Tensor) if "masks" in target else None
        return Shown(
            image.as_subclass(Tensor),
            Things(target["boxes"].as_subclass(Tensor).float(), target["labels"], None, masks),
        )


def _of_each_box(inputs: Any) -> tuple[Tensor, ...]:
    """What goes with a box when it is left out."""
    target = inputs[1]
    return tuple(target[name] for name in ("labels", "masks") if name in target)


def things_of(example: Example, examples: AnnotatedSet) -> Things:
    """What an example's annotations teach: all but crowds, boxes inside of the image."""
    height, width = example.image.shape[1:]
    taught = [thing for thing in example.things if not thing.get("iscrowd")]
    number = {category: place for place, category in enumerate(examples.category_ids)}
    boxes = torch.tensor([thing["bbox"] for thing in taught], dtype=torch.float32).view(-1, 4)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    labels = torch.tensor([number[thing["category_id"]] for thing in taught], dtype=torch.long)
    masks = None
    if examples.has_masks:
        outlines = [compressed(thing["segmentation"], height, width) for thing in taught]
        decoded = rle.decode(outlines) if outlines else np.zeros((height, width, 0), np.uint8)
        masks = torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)))
    return Things(corners.clamp(min=0).minimum(limits), labels, None, masks)


@dataclass(frozen=True)
class Found:
    """What was seen of held-out images, and what was found in them."""

    sizes: dict[int, tuple[int, int]]  # height, width by number of the image
    truth: list[dict[str, Any]]  # annotations in COCO's format
    detections: list[dict[str, Any]]  # in COCO's format of results


@torch.inference_mode()
def find(
    model: nn.Module,
    recipe: Detect,
    heldout: AnnotatedSet,
    examples: Iterable[Example],
    device: torch.device,
) -> Found:
    """What the model finds in held-out images."""
    model.eval()
    found = Found({}, [], [])
    for example in examples:
        image_id = heldout.image_ids[example.index]
        found.sizes[image_id] = tuple(example.image.shape[1:])
        found.truth.extend({**thing, "image_id": image_id} for thing in example.things)
        (things,) = model.find([example.image.to(device)])
        found.detections.extend(as_results(things, image_id, heldout.category_ids))
    return found


def join(parts: Sequence[Found]) -> Found:
    """What was found in the parts of a set."""
    return Found(
        {image: size for part in parts for image, size in part.sizes.items()},
        [thing for part in parts for thing in part.truth],
        [thing for part in parts for thing in part.detections],
    )


def score(found: Found, heldout: AnnotatedSet) -> dict[str, Any]:
    """COCO's measures, or LVIS's of a federated set, of boxes, and of masks where there are any."""
    names = dict(zip(heldout.category_ids, heldout.names, strict=True))
    truth = truth_of(found.sizes, found.truth, names)
    kinds = {"box": "bbox"}
    if heldout.has_masks and all("segmentation" in one for one in found.detections):
        kinds["mask"] = "segm"
    if heldout.federation is None:
        return {name: average_precision(truth, found.detections, kind) for name, kind in kinds.items()}
    federation = heldout.federation
    return {
        name: federated_precision(truth, federation, found.detections, kind) for name, kind in kinds.items()
    }


def as_results(things: Things, image_id: int, category_ids: tuple[int, ...]) -> Iterable[dict[str, Any]]:
    """Detections in COCO's format of results."""
    outlines = [None] * len(things.labels) if things.masks is None else things.masks.cpu().numpy()
    boxes = torch.cat([things.boxes[:, :2], things.boxes[:, 2:] - things.boxes[:, :2]], dim=1)
    for box, label, score, outline in zip(
        boxes.tolist(), things.labels.tolist(), things.scores.tolist(), outlines, strict=True
    ):
        found = {"image_id": image_id, "category_id": category_ids[label]}
        found |= {"bbox": [round(side, 2) for side in box], "score": round(score, 5)}
        yield found if outline is None else found | {"segmentation": outline_of(outline)}
