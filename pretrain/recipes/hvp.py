"""HVP-MTL pre-training runs (arXiv 2310.07510): tags, clusters, masked pixels and a momentum teacher of the tags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from pretrain.config import Backbone, Mask, Optim, Run, Source, Teacher, Views
from pretrain.objectives import OBJECTIVES

TENCENT_18M = 18_000_000  # images, 11,166 tags (Tencent ML-Images)
BATCH = 1024
MASK = Mask(ratio=29 / 49, patch=32, shape="scattered")  # SimMIM hides 0.6 of the 7 x 7 squares at 224 px


def _run(family: str, size: str) -> Run:
    """Swin or ViT-B/16, 30 epochs of Tencent ML-Images with its tags, 224 px.

    deepspeed pretrain/main.py --recipe hvp.swin_b --data tencent_ml=DIR --ds-config ds_configs/zero2.json --out DIR
    Expected (paper): ImageNet-1k fine-tuned 85.3 (Swin-B), 84.2 (ViT-B); COCO Mask R-CNN 1x 47.9 (Swin-B). Not run by
    us at this size. Augmentation is that of M3I in place of the paper's RandAugment.
    """
    return Run(
        name=f"hvp.{size}",
        objective=OBJECTIVES["hvp_mtl"],
        data={"tencent_ml": Source("tags")},
        batch=BATCH,
        steps=30 * TENCENT_18M // BATCH,
        backbone=Backbone(family, size, drop_path=0.1, drop_path_schedule="linear"),
        views=Views(size=224),
        mask=MASK,
        optim=Optim(
            lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, warmup=5 * TENCENT_18M // BATCH, final_lr=1e-7
        ),
        teacher=Teacher(0.995, 0.995),
        save_every=1000,
    )


def ablation(row: str) -> Run:
    """Swin-B with the first of the losses only: a row of the paper's ablation."""
    return replace(_run("swin", "swin_b"), name=f"rows.{row}", objective=OBJECTIVES[row])


RECIPES: dict[str, Callable[[], Run]] = {
    "swin_t": partial(_run, "swin", "swin_t"),
    "swin_s": partial(_run, "swin", "swin_s"),
    "swin_b": partial(_run, "swin", "swin_b"),
    "vit_b16": partial(_run, "vit", "vit_b16"),
}
