"""How does transformers' RT-DETR find things on our backbones?"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert
from transformers import RTDetrConfig, RTDetrForObjectDetection

from pretrain.collectives import sum_over_ranks, world_size
from pretrain.models.pyramid import strides_of
from pretrain.transfer.backbone import pyramid_config
from pretrain.transfer.examples import AnnotatedSet
from pretrain.transfer.pretrained import Pretrained
from pretrain.transfer.recipes import Detect
from pretrain.transfer.things import Shown, Things

MAPS = 3  # the coarsest, as published


def start_norms(net: nn.Module) -> None:
    """Sets the weights of batch norms to 1, as published.

    Transformers draws them around 0 with `initializer_range`, by default 0.01: each of a dozen norms in a row makes
    the signal a hundred times weaker, and what queries are chosen by is the same at every place.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)


class RTDetrHead(nn.Module):
    """RT-DETR (arXiv 2304.08069): queries chosen among the positions of the maps, denoising while it learns; boxes
    alone. Images keep their shape, the longer side becomes `recipe.size`, and padding fills a square.
    """

    def __init__(self, pretrained: Pretrained, recipe: Detect, examples: AnnotatedSet) -> None:
        super().__init__()
        config = pyramid_config(pretrained, recipe.optimisation.drop_path, recipe.width, most=MAPS)
        strides = strides_of(pretrained.encoder.stages)[-MAPS:]
        channels = len(strides)
        self.net = RTDetrForObjectDetection(
            RTDetrConfig(
                backbone_config=config,
                num_labels=len(examples.names),
                d_model=recipe.width,
                encoder_hidden_dim=recipe.width,
                encoder_in_channels=[recipe.width] * channels,
                decoder_in_channels=[recipe.width] * channels,
                num_feature_levels=channels,
                encode_proj_layers=[channels - 1],
                feat_strides=list(strides),
                num_queries=recipe.detections,
                freeze_backbone_batch_norms=False,
                initializer_range=(3 * recipe.width) ** -0.5,  # torch's own deviation at that width
                **recipe.options,
            )
        )
        start_norms(self.net)
        side = -(-recipe.size // strides[-1]) * strides[-1]
        self.transform = GeneralizedRCNNTransform(
            recipe.size, recipe.size, pretrained.views.mean, pretrained.views.std, size_divisible=side
        )
        self.num_classes = len(examples.names)

    def loss(self, shown: list[Shown]) -> Float[Tensor, ""]:
        """Transformers' weighted sum over the decoder's layers, of which each is a sum / the number of boxes.

        A collective call: transformers counts the boxes of this rank, and the mean over the ranks is that sum / all
        boxes. Noisy queries are as many as this rank's images allow, so they differ with the number of ranks.
        """
        device = next(self.parameters()).device
        targets = [
            {"boxes": one.things.boxes.to(device), "labels": one.things.labels.to(device)} for one in shown
        ]
        batch, targets = self.transform([one.image.to(device) / 255 for one in shown], targets)
        height, width = batch.tensors.shape[2:]
        scale = torch.tensor([width, height, width, height], device=device)
        labels = [
            {
                "class_labels": target["labels"],
                "boxes": box_convert(target["boxes"], "xyxy", "cxcywh") / scale,
            }
            for target in targets
        ]
        num_boxes = sum(len(target["labels"]) for target in targets)
        of_all = int(sum_over_ranks(torch.tensor(num_boxes)))
        share = world_size() * max(num_boxes, 1) / max(of_all, 1)  # a count of 0 is taken as 1, here as there
        return share * self.net(batch.tensors, labels=labels).loss

    def find(self, images: list[UInt8[Tensor, "3 _ _"]]) -> list[Things]:
        """As many things as there are queries, by falling score."""
        batch: ImageList
        batch, _ = self.transform([image / 255 for image in images])
        height, width = batch.tensors.shape[2:]
        said = self.net(batch.tensors)
        scale = torch.tensor([width, height, width, height], device=batch.tensors.device)
        scores, places = said.logits.sigmoid().flatten(1).topk(said.logits.shape[1])
        queries = (places // self.num_classes)[..., None].expand(-1, -1, 4)
        boxes = box_convert(said.pred_boxes, "cxcywh", "xyxy").gather(1, queries) * scale
        labels = places % self.num_classes
        found = [
            {"boxes": b, "labels": k, "scores": s} for b, k, s in zip(boxes, labels, scores, strict=True)
        ]
        sizes = [tuple(image.shape[1:]) for image in images]
        found = self.transform.postprocess(found, batch.image_sizes, sizes)
        return [Things(one["boxes"], one["labels"], one["scores"], None) for one in found]
