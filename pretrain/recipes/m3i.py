"""M3I pre-training runs (arXiv 2211.09807); the numbers of table 7 unless a comment says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pretrain.config import Backbone, Decoder, Mask, Optim, Pool, Run, Source, Teacher, Text, Views
from pretrain.objectives import OBJECTIVES

IMAGENET_1K = 1_281_167  # images
PAIRS_427M = 427_000_000  # image-text pairs: LAION-400M, YFCC-15M, CC12M (section 4.1)
LABELLED_15M = 15_000_000  # image-category pairs: ImageNet-22k (section 4.1)
DEMO_GAMMA = 50.0  # 32,000 images teach through their labels first


def vit_b16() -> Run:
    """ViT-B/16, 1600 epochs of ImageNet-1k (category supervision), 224 px.

    deepspeed pretrain/main.py --recipe m3i.vit_b16 --data imagenet1k=DIR --ds-config ds_configs/zero2.json
        --out DIR
    Expected (paper, table 1): linear 83.8, fine-tuned 84.2 top-1. Not run by us at this size.
    """
    batch = 4096
    return Run(
        name="m3i.vit_b16",
        objective=OBJECTIVES["m3i"],
        data={"imagenet1k": Source("category")},
        batch=batch,
        steps=1600 * IMAGENET_1K // batch,
        backbone=Backbone("vit", "vit_b16", drop_path=0.1, drop_path_schedule="linear"),
        decoder=Decoder(layers=4, width=768, ffn=3072, heads=16),
        pool=Pool(heads=16, width=768),
        views=Views(size=224),
        optim=Optim(lr=1e-3, weight_decay=0.1, warmup=40 * IMAGENET_1K // batch),
        teacher=Teacher(0.995, 1.0),
        save_every=1000,
    )


def internimage_h() -> Run:
    """InternImage-H (1.09e9 parameters), 30 epochs of 427M image-text and 15M image-category pairs, 192 px.

    deepspeed pretrain/main.py --recipe m3i.internimage_h --data laion400m=DIR yfcc15m=DIR cc12m=DIR
        imagenet22k=DIR --ds-config ds_configs/zero3.json --out DIR
    Expected (paper, section 4.2): ImageNet 89.2 top-1, COCO 65.4 box AP after transfer. Not run by us at this
    size. Sources are mixed by their numbers of samples.
    """
    batch = 40_000
    epoch = (PAIRS_427M + LABELLED_15M) // batch
    return Run(
        name="m3i.internimage_h",
        objective=OBJECTIVES["m3i"],
        data={
            "laion400m": Source("text", weight=400),
            "yfcc15m": Source("text", weight=15),
            "cc12m": Source("text", weight=12),
            "imagenet22k": Source("category", weight=15),
        },
        batch=batch,
        steps=30 * epoch,
        backbone=Backbone("internimage", "internimage_h", drop_path=0.2, drop_path_schedule="uniform"),
        decoder=Decoder(layers=4, width=1024, ffn=4096, heads=16),
        pool=Pool(heads=16, width=768),
        views=Views(size=192),
        optim=Optim(lr=1e-3, weight_decay=0.1, warmup=epoch),
        teacher=Teacher(0.995, 1.0),
        save_every=500,
    )


def demo() -> Run:
    """A small InternImage at 64 px on the embedded scenes: the whole path in minutes on two cores.

    `make demo` runs it. Smaller in every size than table 7; the mask squares are 8 px because the token grid
    of the three-stage backbone has stride 8. 32,000 images need what billions do not: gentle augmentation, a
    teacher that follows fast, label gradients that lead, captions (13 a batch, a noisy gradient) that count a
    tenth, and tokens and embeddings standardised over the batch (benchmarks/feature_norm.py).
    """
    m3i = OBJECTIVES["m3i"]
    text = replace(m3i.targets["text"], weight=0.1)
    return Run(
        name="m3i.demo",
        objective=replace(m3i, targets=m3i.targets | {"text": text}, gamma=DEMO_GAMMA),
        data={"labelled": Source("category", weight=4), "captioned": Source("text")},
        batch=64,
        steps=500,
        backbone=Backbone("internimage", "internimage_demo", 0.0, token_width=128, token_norm="batch"),
        decoder=Decoder(layers=1, width=96, ffn=256, heads=4),
        pool=Pool(heads=4, width=128, norm="batch"),
        text=Text(layers=1, width=128, ffn=256, heads=4, length=24),
        views=Views(
            size=64,
            scale=(0.7, 1.0),
            jitter_probability=0.3,
            grayscale=0.0,
            blur=(0.0, 0.0),
            solarize=(0.0, 0.0),
        ),
        mask=Mask(patch=8),
        optim=Optim(lr=6e-4, weight_decay=0.05, warmup=40),
        teacher=Teacher(0.97, 0.99),
        save_every=100,
        log_every=5,
    )


RECIPES: dict[str, Callable[[], Run]] = {
    "vit_b16": vit_b16,
    "internimage_h": internimage_h,
    "demo": demo,
}
