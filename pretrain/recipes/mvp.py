"""MVP pre-training runs (Multimodality-guided Visual Pre-training, ECCV 2022): a frozen CLIP guides masked images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pretrain.config import Backbone, Mask, Optim, Run, Source, Views
from pretrain.objectives import OBJECTIVES
from pretrain.recipes.m3i import IMAGENET_1K

HIDDEN = 75 / 196  # patches, exactly 75 at 224 px
BATCH = 2048  # BEiT's; the paper gives none


def vit_b16() -> Run:
    """ViT-B/16, 300 epochs of ImageNet-1k without labels, 224 px, guided by CLIP ViT-B/16.

    deepspeed pretrain/main.py --recipe mvp.vit_b16 --data imagenet1k=DIR --guide CLIP_FOLDER
        --ds-config ds_configs/zero2.json --out DIR
    Expected (paper): fine-tuned 84.4 top-1, linear 75.4, ADE20k 52.4 mIoU. Not run by us at this size.
    """
    return Run(
        name="mvp.vit_b16",
        objective=OBJECTIVES["mvp"],
        data={"imagenet1k": Source("none")},
        batch=BATCH,
        steps=300 * IMAGENET_1K // BATCH,
        backbone=Backbone("vit", "vit_b16", drop_path=0.1, drop_path_schedule="linear"),
        views=Views(size=224, jitter_probability=0.0, grayscale=0.0, blur=(0.0, 0.0), solarize=(0.0, 0.0)),
        mask=Mask(ratio=HIDDEN),
        optim=Optim(lr=1.5e-3, weight_decay=0.05, warmup=10 * IMAGENET_1K // BATCH, clip=3.0),
        save_every=1000,
    )


def vit_l16() -> Run:
    """ViT-L/16 otherwise as `vit_b16`, guided by the same CLIP ViT-B/16.

    deepspeed pretrain/main.py --recipe mvp.vit_l16 --data imagenet1k=DIR --guide CLIP_FOLDER
        --ds-config ds_configs/zero2.json --out DIR
    Expected (paper): fine-tuned 86.3 top-1, ADE20k 54.3 mIoU. Not run by us at this size.
    """
    return replace(
        vit_b16(),
        name="mvp.vit_l16",
        backbone=Backbone("vit", "vit_l16", drop_path=0.1, drop_path_schedule="linear"),
    )


RECIPES: dict[str, Callable[[], Run]] = {"vit_b16": vit_b16, "vit_l16": vit_l16}
