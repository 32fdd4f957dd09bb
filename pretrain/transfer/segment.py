"""How well does a backbone with UperNet tell the class of each pixel?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import UperNetConfig, UperNetForSemanticSegmentation
from transformers.models.upernet.modeling_upernet import UperNetFCNHead

from pretrain.collectives import sum_over_ranks, world_size
from pretrain.evaluate.regions import count_pixels, score_regions
from pretrain.models.pixels import normalise
from pretrain.transfer.backbone import pyramid_config
from pretrain.transfer.examples import IGNORED, AnnotatedSet, Example
from pretrain.transfer.pretrained import Pretrained
from pretrain.transfer.recipes import Segment


class Segmenter(nn.Module):
    """UperNet of transformers on a pre-trained backbone: normalised images [b, 3, h, w] -> logits [b, k, h, w].

    Sides are multiples of `divisor`. The auxiliary head reads the second-last map. Source: arXiv 1807.10221.
    """

    def __init__(self, pretrained: Pretrained, recipe: Segment, num_classes: int) -> None:
        super().__init__()
        backbone = pyramid_config(pretrained, recipe.optimisation.drop_path, recipe.pyramid_width)
        self.net = UperNetForSemanticSegmentation(
            UperNetConfig(
                backbone_config=backbone,
                num_labels=num_classes,
                hidden_size=recipe.head_width,
                auxiliary_channels=recipe.auxiliary_width,
                auxiliary_loss_weight=recipe.auxiliary_weight,
                use_auxiliary_head=recipe.auxiliary_weight > 0,
                loss_ignore_index=IGNORED,
            )
        )
        if self.net.auxiliary_head is not None:  # on the third map of four, whatever the number of maps
            widths = self.net.backbone.channels
            self.net.auxiliary_head = UperNetFCNHead(self.net.config, widths, in_index=len(widths) - 2)
        self.divisor = self.net.backbone.strides[-1]
        self.mean, self.std = pretrained.views.mean, pretrained.views.std

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k h w"]:
        return self.net(images).logits

    def loss(self, examples: list[Example]) -> Float[Tensor, ""]:
        """Cross-entropy in nats over taught pixels (0 without any), main head + weight x auxiliary head.

        A collective call: the mean over the ranks is that over all of their pixels.
        """
        device = next(self.parameters()).device
        classes = torch.stack([example.classes for example in examples]).long()
        num_taught = int((classes != IGNORED).sum())
        share = world_size() * num_taught / max(int(sum_over_ranks(torch.tensor(num_taught))), 1)
        if not num_taught:  # crops beside all that is labelled: a mean over no pixel is no number
            classes = torch.zeros_like(classes)
        images = torch.stack([example.image for example in examples]).to(device)
        images = normalise(images, self.mean, self.std, torch.float32)
        return share * self.net(images, labels=classes.to(device)).loss


def loss_of(model: Segmenter, examples: list[Example]) -> Float[Tensor, ""]:
    """What `train` asks for."""
    return model.loss(examples)


@dataclass(frozen=True)
class Draw:
    """An example's crop for training: another size, a square of it, perhaps mirrored."""

    examples: AnnotatedSet
    recipe: Segment
    divisor: int

    def __call__(self, index: int) -> Example:
        """Draws from torch's global generator, as torchvision does. What lies outside the image is IGNORED."""
        example = self.examples.example(index)
        side = crop_side(self.recipe.size, self.divisor)
        shorter = [round(self.recipe.size * scale) for scale in self.recipe.scales]
        change = v2.Compose(
            [
                v2.RandomShortestSize(range(shorter[0], shorter[1] + 1), antialias=True),
                v2.RandomCrop(side, pad_if_needed=True, fill={tv_tensors.Mask: IGNORED, tv_tensors.Image: 0}),
                v2.RandomHorizontalFlip(self.recipe.flip),
            ]
        )
        image, classes = change(tv_tensors.Image(example.image), tv_tensors.Mask(example.classes))
        return Example(image.as_subclass(Tensor), index, classes.as_subclass(Tensor))


def crop_side(size: int, divisor: int) -> int:
    """The size, raised to the next multiple of the pyramid's coarsest stride."""
    return -(-size // divisor) * divisor


@torch.inference_mode()
def count(
    model: Segmenter,
    recipe: Segment,
    heldout: AnnotatedSet,
    examples: Iterable[Example],
    device: torch.device,
) -> Int[Tensor, "n 3 k"]:
    """What `score` reads: pixels of held-out images by class, of whole images at one scale."""
    model.eval()
    num_classes = len(heldout.names)
    counts = [torch.zeros(0, 3, num_classes, dtype=torch.long)]
    for example in examples:
        predicted = predict(model, example.image.to(device), recipe.size)[None].cpu()
        truth = example.classes[None].long()
        is_judged = truth != IGNORED
        pair = (torch.where(is_judged, said, num_classes) for said in (predicted, truth))
        counts.append(count_pixels(*pair, num_classes + 1)[..., :num_classes])
    return torch.cat(counts)


def score(counts: Int[Tensor, "n 3 k"], names: tuple[str, ...]) -> dict[str, Any]:
    """Mean IoU over the classes with its bootstrap interval (see `score_regions`), None of a single image."""
    return score_regions(counts, names, everywhere=int(counts[:, 2].sum(0).argmax()))


def predict(model: Segmenter, image: UInt8[Tensor, "3 h w"], size: int) -> Int[Tensor, "h w"]:
    """Class of each pixel: the shorter side becomes `size`, edges are padded, logits go back bilinearly."""
    height, width = image.shape[1:]
    ratio = size / min(height, width)
    sides = (round(height * ratio), round(width * ratio))
    resized = v2.functional.resize(image, list(sides), antialias=True)[None]
    images = normalise(resized, model.mean, model.std, torch.float32)
    padded = F.pad(images, (0, -sides[1] % model.divisor, 0, -sides[0] % model.divisor))
    logits = model(padded)[..., : sides[0], : sides[1]]
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)[0].argmax(0)
