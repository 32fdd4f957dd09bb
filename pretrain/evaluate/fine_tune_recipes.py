"""By which numbers is an encoder, or a head on a frozen one, trained on the categories of augmented images?

RECIPES are of fine-tuning. Source: M3I (arXiv 2211.09807), appendix, fine-tuning of ViT-B on ImageNet-1k. "paper" has
its numbers, without an average of the weights, of which the paper tells nothing; "small" is it scaled to small sets:
the batch, square-root scaling of the rate, milder crops, no RandAugment, erasing or drop path, mixing off.

FEW are of fine-tuning on few labels, by the recipe of all of them and per cent of the labels. They count updates, as
an epoch of few images is next to nothing: BiT (arXiv 1912.11370, HyperRule) has one number for all sets of less than
20,000. "paper" has those of Semi-ViT (arXiv 2208.05688), supervised fine-tuning of MAE's ViT-B on 1 and 10 % of
ImageNet-1k: 2,500 and 25,000 updates at a batch of 512, on 1 % without mixing, erasing and drop path. In "small" the
new head learns faster than the encoder, by SwAV's ratio on 10 % (arXiv 2006.09882; 250 on 1 %), and crops are milder
still; benchmarks/transfer.py tells how its numbers were chosen.

FROZEN are of heads. "linear_paper" is the same appendix's linear probe: LARS, rate 3.2 at a batch of 16,384, no
weight decay, 90 epochs, 10 of them warm-up, cosine, random crops and flips; the batch norm without affine and the
momentum are MAE's (arXiv 2111.06377, appendix A.1). "attentive_crops" is after V-JEPA's attentive probe (arXiv
2404.08471, appendix D): AdamW, 20 epochs. A set of fewer images has smaller batches. LARS keeps its rate then: its
layer-wise trust ratio makes a step a share of the weights, whatever the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pretrain.evaluate.rows import SHARES

WHOLE, LINEAR, ATTENTIVE = "whole encoder", "linear head", "attentive head"  # what is trained
ADAMW, LARS = "adamw", "lars"
BASE_BATCH = 1024  # images, at which the paper gives its rate


def images_of_step(num_images: int, batch: int, batches: int) -> int:
    """The batch; of a smaller set so many that an epoch has `batches` steps, as long as they hold 32 images."""
    return min(batch, num_images, max(num_images // batches, 32))


@dataclass(frozen=True)
class FineTune:
    """The recipe of fine-tuning, or of training a head alone."""

    epochs: int = 30  # over the training images; 0: `updates` are given
    updates: int = 0  # of the weights, through as many epochs as it takes; 0: `epochs` are given
    trains: str = WHOLE  # or LINEAR or ATTENTIVE: a head on the frozen encoder
    batch: int = 64  # images of all ranks together; of a small data set fewer
    batches: int = 1  # at least, of an epoch, as long as they hold 32 images
    optimizer: str = ADAMW  # or LARS
    base_lr: float = 2e-3  # peak at a batch of BASE_BATCH; of LARS at any
    warmup: float = 0.05  # fraction of the steps, in [0, 1)
    layer_decay: float = 0.65  # rate of a layer / rate of the next one, in (0, 1]
    head_rate: float = 1.0  # rate of the head / the recipe's, which the encoder's last layer has almost
    decay_depth: int = 12  # layers of the backbone for which it is given; a deeper one's decay is milder
    weight_decay: float = 0.1  # of matrices
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW; LARS has the first as its momentum
    smoothing: float = 0.1  # of the labels, in [0, 1)
    scale: tuple[float, float] = (0.5, 1.0)  # crop area / image area
    flip: float = 0.5  # probability
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: float = 0.0  # alpha; 0: off
    rand_augment: str = ""  # timm's notation; "": off
    erasing: float = 0.0  # probability of a random rectangle of noise
    drop_path: float = 0.0  # of the last block, rising from 0
    seed: int = 0  # of order, crops, flips and mixing; the head starts from zero

    def __post_init__(self) -> None:
        if min(self.epochs, self.updates) < 0 or (self.epochs > 0) == (self.updates > 0):
            raise ValueError(
                f"fine-tuning with epochs={self.epochs}, updates={self.updates}: one of the two must be at least 1, "
                "the other 0"
            )
        if self.batch < 2 or self.batch % 2:
            raise ValueError(
                f"fine-tuning with batch={self.batch}: it must be positive and even, as mixing pairs its images"
            )
        if not 0 < self.layer_decay <= 1 or self.decay_depth < 1:
            raise ValueError(
                f"layer_decay={self.layer_decay} must lie in (0, 1], where 1 means one rate for all, and "
                f"decay_depth={self.decay_depth} must be at least 1"
            )
        if not (0 <= self.warmup < 1 and 0 <= self.smoothing < 1):
            raise ValueError(f"warmup={self.warmup} and smoothing={self.smoothing} must lie in [0, 1)")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale} must be two rising fractions of the image's area")
        if not (0 <= self.erasing <= 1 and 0 <= self.drop_path < 1):
            raise ValueError(f"erasing={self.erasing} and drop_path={self.drop_path} must be probabilities")
        if min(self.base_lr, self.head_rate) <= 0 or min(self.mixup, self.cutmix, self.weight_decay) < 0:
            raise ValueError(
                f"base_lr={self.base_lr} and head_rate={self.head_rate} must be positive; mixup={self.mixup}, "
                f"cutmix={self.cutmix} and weight_decay={self.weight_decay} must not be negative"
            )
        if self.trains not in (WHOLE, LINEAR, ATTENTIVE) or self.optimizer not in (ADAMW, LARS):
            raise ValueError(
                f"trains={self.trains!r} must be one of {WHOLE!r}, {LINEAR!r}, {ATTENTIVE!r}, and "
                f"optimizer={self.optimizer!r} one of {ADAMW!r}, {LARS!r}"
            )
        off = dict.fromkeys(("mixup", "cutmix", "erasing", "drop_path", "smoothing"), 0.0) | {
            "head_rate": 1.0
        }
        ignored = [name for name, value in off.items() if getattr(self, name) != value]
        if self.trains != WHOLE and ignored:
            raise ValueError(
                f"training of a {self.trains} takes crops, flips and RandAugment, not {', '.join(ignored)}"
            )

    def batch_of(self, num_images: int) -> int:
        """Images of a step, even, where the data set has so many."""
        most = images_of_step(num_images, self.batch, self.batches)
        return most - most % 2

    def steps(self, an_epoch: int) -> int:
        """Updates in all, where an epoch has that many."""
        return self.updates or self.epochs * an_epoch

    def peak(self, batch: int) -> float:
        """The highest rate."""
        return self.base_lr if self.optimizer == LARS else self.base_lr * math.sqrt(batch / BASE_BATCH)


RECIPES: dict[str, FineTune] = {
    "small": FineTune(),
    "paper": FineTune(
        epochs=100,
        batch=BASE_BATCH,
        scale=(0.08, 1.0),
        mixup=0.8,
        cutmix=1.0,
        rand_augment="rand-m9-mstd0.5-inc1",
        erasing=0.25,
        drop_path=0.1,
    ),
}

_SMALL_FEW = replace(
    RECIPES["small"], epochs=0, updates=60, batch=32, base_lr=1e-3, head_rate=20.0, scale=(0.9, 1.0)
)
_PAPER_TEN = replace(
    RECIPES["paper"],
    epochs=0,
    updates=25_000,
    batch=512,
    base_lr=5e-4 * math.sqrt(BASE_BATCH / 512),
    weight_decay=0.05,
)
_PAPER_ONE = replace(
    _PAPER_TEN,
    updates=2_500,
    base_lr=1e-4 * math.sqrt(BASE_BATCH / 512),
    mixup=0.0,
    cutmix=0.0,
    erasing=0.0,
    drop_path=0.0,
)
FEW: dict[str, dict[int, FineTune]] = {
    "small": dict.fromkeys(SHARES, _SMALL_FEW),
    "paper": dict(zip(SHARES, (_PAPER_ONE, _PAPER_TEN), strict=True)),
}

# Row of the result -> recipe of a head, each alone on what it is shown.
FROZEN: dict[str, FineTune] = {
    "linear_paper": FineTune(
        epochs=90,
        trains=LINEAR,
        batch=16_384,
        batches=16,
        optimizer=LARS,
        base_lr=3.2,
        warmup=10 / 90,
        layer_decay=1.0,
        weight_decay=0.0,
        smoothing=0.0,
        scale=(0.08, 1.0),
    ),
    "attentive_crops": FineTune(
        epochs=20,
        trains=ATTENTIVE,
        batch=BASE_BATCH,
        batches=16,
        base_lr=1e-3,
        warmup=0.1,
        layer_decay=1.0,
        weight_decay=0.01,
        smoothing=0.0,
        scale=(0.08, 1.0),
    ),
}
