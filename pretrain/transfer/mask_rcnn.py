"""How does torchvision's Mask R-CNN find things on our backbones?"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from jaxtyping import Float, UInt8
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pretrain.transfer.backbone import PyramidBackbone, pyramid_config
from pretrain.transfer.examples import AnnotatedSet, shown_in
from pretrain.transfer.federated_heads import FederatedHeads, image_counts
from pretrain.transfer.lvis import FEDERATED
from pretrain.transfer.pretrained import Pretrained
from pretrain.transfer.recipes import Detect
from pretrain.transfer.things import Shown, Things

RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchor boxes
ROI_SIZE, MASK_SIZE = 7, 14  # positions a side of what the box head and the mask head see
MASK_LAYERS = 4  # 3x3 convolutions of the mask head, unless options say so
REPRESENTATION = 1024  # width of the box head, unless options say so
THRESHOLD = 0.5  # of a mask's probability


class MapsWithFPN(nn.Module):
    """What torchvision asks of a backbone: images -> maps by name, all `out_channels` wide, one coarser by pooling.

    FPN (arXiv 1612.03144) joins the maps of stages; those of a simple feature pyramid are taken as they are.
    """

    def __init__(self, backbone: PyramidBackbone, width: int) -> None:
        super().__init__()
        self.backbone, self.out_channels = backbone, width
        is_even = set(backbone.channels) == {width}
        self.fpn = None if is_even else FeaturePyramidNetwork(backbone.channels, width, LastLevelMaxPool())
        self.names = [str(place) for place in range(len(backbone.channels))]

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        maps = OrderedDict(zip(self.names, self.backbone(images).feature_maps, strict=True))
        if self.fpn is not None:
            return self.fpn(maps)
        maps["pool"] = nn.functional.max_pool2d(maps[self.names[-1]], 1, 2)
        return maps


class MaskRCNNHead(nn.Module):
    """Mask R-CNN (arXiv 1703.06870), or Faster R-CNN where the data has no outlines."""

    def __init__(self, pretrained: Pretrained, recipe: Detect, examples: AnnotatedSet) -> None:
        super().__init__()
        num_classes, width = len(examples.names), recipe.width
        config = pyramid_config(pretrained, recipe.optimisation.drop_path, width)
        maps = MapsWithFPN(PyramidBackbone(config), width)
        strides = maps.backbone.strides
        sizes = tuple((recipe.anchor * stride,) for stride in (*strides, 2 * strides[-1]))
        options = dict(recipe.options)
        representation = options.pop("representation", REPRESENTATION)
        norm = LayerNorm2d if options.pop("has_norms", False) else None
        box_shape, box_layers = (width, ROI_SIZE, ROI_SIZE), [width] * options.pop("box_layers", 0)
        mask_layers = [width] * options.pop("mask_layers", MASK_LAYERS)
        rpn_layers, federated = options.pop("rpn_layers", 1), options.pop(FEDERATED, 0)
        roi = {"featmap_names": maps.names, "sampling_ratio": 2}
        shared: dict[str, Any] = {
            "min_size": recipe.size,
            "max_size": recipe.size,
            "image_mean": pretrained.views.mean,
            "image_std": pretrained.views.std,
            "size_divisible": strides[-1],
            "box_detections_per_img": recipe.detections,
            "rpn_anchor_generator": AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
            "rpn_head": RPNHead(width, len(RATIOS), rpn_layers),
            "box_roi_pool": MultiScaleRoIAlign(output_size=ROI_SIZE, **roi),
            "box_head": FastRCNNConvFCHead(box_shape, box_layers, [representation], norm)
            if box_layers
            else TwoMLPHead(math.prod(box_shape), representation),
            "box_predictor": FastRCNNPredictor(representation, num_classes + 1),
            **options,
        }
        if examples.has_masks:
            pool = MultiScaleRoIAlign(output_size=MASK_SIZE, **roi)
            head = MaskRCNNHeads(width, mask_layers, dilation=1, norm_layer=norm)
            predictor = MaskRCNNPredictor(width, width, num_classes + 1)
            shared |= {"mask_roi_pool": pool, "mask_head": head, "mask_predictor": predictor}
        self.net = (MaskRCNN if examples.has_masks else FasterRCNN)(maps, **shared)
        if federated:
            counts = image_counts(shown_in(examples), num_classes)
            self.net.roi_heads = FederatedHeads(self.net.roi_heads, counts, federated)

    def loss(self, shown: list[Shown]) -> Float[Tensor, ""]:
        """Sum of torchvision's losses, nats but for the boxes' smooth L1.

        Means over the anchors, proposals and things that are sampled of these images; on several ranks each takes the
        mean of its own, as all toolkits do, so a rank with few things gives each of them more weight.
        """
        device = next(self.parameters()).device
        images, targets = [], []
        for one in shown:
            target = {"boxes": one.things.boxes.to(device), "labels": one.things.labels.to(device) + 1}
            if one.things.masks is not None:
                target["masks"] = one.things.masks.to(device)
            images.append(one.image.to(device) / 255)
            targets.append(target)
        return torch.stack(list(self.net(images, targets).values())).sum()

    def find(self, images: list[UInt8[Tensor, "3 _ _"]]) -> list[Things]:
        """Things by falling score; torchvision keeps scores above its `box_score_thresh`."""
        found = self.net([image / 255 for image in images])
        return [
            Things(
                one["boxes"],
                one["labels"] - 1,
                one["scores"],
                (one["masks"][:, 0] >= THRESHOLD).to(torch.uint8) if "masks" in one else None,
            )
            for one in found
        ]
