"""With which numbers are dense heads trained? The papers' recipes, and small ones for two cores; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pretrain.model_config import fraction, positive


@dataclass(frozen=True)
class Optimisation:
    """AdamW with layer-wise decay of the rate."""

    steps: int
    batch: int  # images
    lr: float  # peak, of the head
    warmup: int  # steps of a linear rise
    schedule: Literal["linear", "step", "cosine"] = "linear"  # key of training.SCHEDULES
    milestones: tuple[float, ...] = ()  # of "step": shares of the steps after which the rate is a tenth
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # rate of a layer of the backbone / rate of the next one, in (0, 1]
    decay_depth: int = 12  # layers of the backbone for which that is given; a deeper one's decay is milder
    backbone_rate: float = 1.0  # factor of all rates of the backbone, in (0, 1]
    drop_path: float = 0.0  # of the backbone, where it is trained
    clip: float = 0.0  # norm of the gradient; 0: not clipped
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        rates = {"layer_decay": self.layer_decay, "backbone_rate": self.backbone_rate}
        positive("optimisation", steps=self.steps, batch=self.batch, lr=self.lr, **rates)
        positive("optimisation", decay_depth=self.decay_depth)
        fraction("optimisation", drop_path=self.drop_path, **rates)
        if not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"optimisation.warmup={self.warmup} must lie in [0, {self.steps}), the steps: lower it"
            )
        if not min(self.weight_decay, self.clip) >= 0 or not math.isfinite(self.clip):
            raise ValueError(
                f"optimisation.weight_decay={self.weight_decay} and clip={self.clip} must not be negative, and finite"
            )


@dataclass(frozen=True)
class Segment:
    """UperNet (arXiv 1807.10221) on the backbone."""

    optimisation: Optimisation
    size: int  # pixels, side of a training crop; tested images have this shorter side
    scales: tuple[float, float] = (0.5, 2.0)  # shorter side before the crop / size
    flip: float = 0.5  # probability
    head_width: int = 512
    auxiliary_width: int = 256  # of the convolutional head on the second-last map
    auxiliary_weight: float = 0.4  # of its cross-entropy
    pyramid_width: int = 256  # of the maps made for a backbone of one stage


@dataclass(frozen=True)
class Detect:
    """A detector on the backbone, `head` by name; what `options` say to it is the head's own."""

    optimisation: Optimisation
    size: int  # pixels, side of a training canvas; tested images have this longer side
    scales: tuple[float, float] = (0.1, 2.0)  # longer side before the crop / size
    flip: float = 0.5  # probability
    head: Literal["mask_rcnn", "rt_detr"] = "mask_rcnn"  # key of detect.HEADS
    width: int = 256  # of FPN or of the transformer
    anchor: int = 8  # side of an anchor box / stride of its map
    detections: int = 100  # most of an image
    repeat: float = 0.0  # images with a class that fewer than this share of them shows come more often (LVIS)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fraction("detect", repeat=self.repeat)


VITDET_HEADS = {"rpn_layers": 2, "box_layers": 4, "has_norms": True}  # of arXiv 2203.16527, appendix


def _vitdet(lr: float, steps: int) -> Detect:
    """ViTDet: large-scale jitter at 1024 px, step schedule, 100 epochs (M3I, appendix; arXiv 2203.16527, appendix).

    Steps, milestones and the decay by layer are those of ViT-B in detectron2 (projects/ViTDet,
    mask_rcnn_vitdet_b_100ep of COCO and of LVIS): the rate falls at 163,889 and 177,546 of 184,375 steps, at 138,889
    and 150,463 of 156,250.
    """
    return Detect(
        Optimisation(
            steps=steps,
            batch=64,
            lr=lr,
            warmup=250,
            schedule="step",
            milestones=(8 / 9, 26 / 27),
            weight_decay=0.1,
            layer_decay=0.7,
            drop_path=0.1,
        ),
        size=1024,
        options=VITDET_HEADS,
    )


def coco() -> Detect:
    """COCO: 100 epochs of 118,000 images, 184,375 steps of 64. Without ViTDet's windows and relative positions. Not
    run by us."""
    return _vitdet(1e-4, 184_375)


def lvis() -> Detect:
    """LVIS v1: 100 epochs of 100,000 images, 156,250 steps of 64, at twice the rate; 300 things an image, as LVIS
    asks. Images of rare categories are repeated, and every category is judged by itself, 50 of them at a step, as
    ViTDet does there. Without its windows and relative positions. Not run by us."""
    return replace(
        _vitdet(2e-4, 156_250),
        detections=300,
        repeat=0.001,
        options={**VITDET_HEADS, "box_score_thresh": 0.02, "federated": 50},
    )


def coco_internimage() -> Detect:
    """COCO on an InternImage: its Mask R-CNN's rate, decays and 36 epochs of 118,287 images, 7,393 steps of 16 each,
    with InternImage-H's drop path (arXiv 2211.05778, and its configurations of detection), on ViTDet's canvas in
    place of several sizes. The paper's own for H is DINO on two backbones. Not run by us."""
    return Detect(
        Optimisation(
            steps=36 * 7_393,
            batch=16,
            lr=1e-4,
            warmup=500,
            schedule="step",
            milestones=(27 / 36, 33 / 36),
            layer_decay=0.95,
            decay_depth=50,
            drop_path=0.5,
        ),
        size=1024,
    )


def ade20k_internimage() -> Segment:
    """ADE20k on InternImage-H: its UperNet's 160,000 steps of 16 crops at 896 px (arXiv 2211.05778, and its
    configurations of segmentation). Not run by us."""
    return Segment(
        Optimisation(
            steps=160_000,
            batch=16,
            lr=2e-5,
            warmup=1500,
            layer_decay=0.95,
            decay_depth=50,
            drop_path=0.5,
            clip=0.1,
        ),
        size=896,
    )


def ade20k() -> Segment:
    """ADE20k: 160,000 steps of 16 crops at 512 px, linear schedule (M3I, appendix). The decay by layer, which the
    paper does not name, is that of MAE's ViT-B with the same other numbers (mmsegmentation, mae-base_upernet).
    Without the paper's relative positions. Not run by us."""
    return Segment(
        Optimisation(
            steps=160_000,
            batch=16,
            lr=1e-4,
            warmup=1500,
            weight_decay=0.05,
            layer_decay=0.65,
            drop_path=0.1,
        ),
        size=512,
    )


def small_segment() -> Segment:
    """A minute or two of two cores on the embedded scenes (`benchmarks/dense_transfer.py`)."""
    return Segment(
        Optimisation(steps=300, batch=16, lr=5e-3, warmup=20, layer_decay=0.8, backbone_rate=0.1),
        size=64,
        scales=(0.8, 1.5),
        head_width=48,
        auxiliary_width=32,
        pyramid_width=48,
    )


def small_detect() -> Detect:
    """A few minutes of two cores on the embedded scenes, or on a few hundred photographs (the same)."""
    return Detect(
        Optimisation(steps=200, batch=8, lr=4e-3, warmup=20, layer_decay=0.8, backbone_rate=0.2, clip=10.0),
        size=64,
        scales=(0.8, 1.25),
        width=64,
        anchor=4,
        options={
            "representation": 128,
            "mask_layers": 2,
            "rpn_pre_nms_top_n_train": 200,
            "rpn_pre_nms_top_n_test": 200,
            "rpn_post_nms_top_n_train": 100,
            "rpn_post_nms_top_n_test": 50,
            "box_batch_size_per_image": 32,
        },
    )


def small_detr() -> Detect:
    """The same budget for RT-DETR (arXiv 2304.08069)."""
    return Detect(
        Optimisation(steps=300, batch=16, lr=4e-3, warmup=20, layer_decay=0.8, backbone_rate=0.05, clip=1.0),
        size=64,
        scales=(0.75, 1.33),
        head="rt_detr",
        width=64,
        detections=30,
        options={
            "decoder_layers": 2,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_denoising": 20,
        },
    )


def coco_detr() -> Detect:
    """RT-DETR's own 72 epochs of COCO's 118,287 images at 640 px, 7,393 steps of 16 each (arXiv 2304.08069, appendix;
    the published rtdetr_r50vd_6x_coco): a rate that stays after the warm-up, a tenth of it for the backbone. Without
    its average of the weights, colours and crops. Not run by us."""
    return Detect(
        Optimisation(
            steps=72 * 7_393,
            batch=16,
            lr=1e-4,
            warmup=2000,
            schedule="step",  # without a milestone
            weight_decay=1e-4,
            backbone_rate=0.1,
            clip=0.1,
        ),
        size=640,
        scales=(0.5, 1.5),
        head="rt_detr",
        detections=300,
    )


RECIPES = {
    "segment": {"small": small_segment, "ade20k": ade20k, "ade20k_internimage": ade20k_internimage},
    "detect": {
        "small": small_detect,
        "coco": coco,
        "coco_internimage": coco_internimage,
        "lvis": lvis,
        "small_detr": small_detr,
        "coco_detr": coco_detr,
    },
}


def recipe(task: str, name: str) -> Segment | Detect:
    """ValueError lists the names of that task."""
    if name not in RECIPES[task]:
        raise ValueError(f"--recipe {name!r} is unknown for `{task}`; choose from {sorted(RECIPES[task])}")
    return RECIPES[task][name]()
