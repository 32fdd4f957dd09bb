"""How well does the encoder tell the categories when all of it is trained on them?

Source of the recipes: M3I (arXiv 2211.09807), appendix, fine-tuning of ViT-B on ImageNet-1k. "paper" has its numbers,
without an average of the weights, of which the paper tells nothing; "small" is it scaled to small sets: the batch,
square-root scaling of the rate, milder crops, no RandAugment, erasing or drop path, mixing off.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from pretrain.config import Run
from pretrain.data.views import cut, draw_crop
from pretrain.evaluate.augment import rand_augment, seeded
from pretrain.evaluate.evidence import NotMeasured
from pretrain.evaluate.features import IMAGES_AT_ONCE, Pictures
from pretrain.evaluate.layers import UnknownOrder, layer_order, names_without_decay
from pretrain.evaluate.published import PublishedEncoder
from pretrain.models.backbone import build_encoder
from pretrain.models.drop_path import DropPath
from pretrain.models.pixels import normalise
from pretrain.optim import warm_cosine

BASE_BATCH = 1024  # images, at which the paper gives its rate


@dataclass(frozen=True)
class FineTune:
    """The recipe of fine-tuning."""

    epochs: int = 30  # over the training images
    batch: int = 64  # images; fewer when the data set has fewer
    base_lr: float = 2e-3  # peak at a batch of BASE_BATCH
    warmup: float = 0.05  # fraction of the steps, in [0, 1)
    layer_decay: float = 0.65  # rate of a layer / rate of the next one, in (0, 1]
    weight_decay: float = 0.1  # of matrices
    betas: tuple[float, float] = (0.9, 0.999)
    smoothing: float = 0.1  # of the labels, in [0, 1)
    scale: tuple[float, float] = (0.5, 1.0)  # crop area / image area
    flip: float = 0.5  # probability
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: float = 0.0  # alpha; 0: off
    rand_augment: str = ""  # timm's notation; "": off
    erasing: float = 0.0  # probability of a random rectangle of noise
    drop_path: float = 0.0  # of the last block, rising from 0; only where the encoder can be built anew
    seed: int = 0  # of order, crops, flips and mixing; the head starts from zero

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or self.batch % 2:
            raise ValueError(
                f"fine-tuning with epochs={self.epochs}, batch={self.batch}: epochs must be at least 1, the batch "
                "positive and even, as mixing pairs its images"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} must lie in (0, 1]: 1 means one rate for all")
        if not (0 <= self.warmup < 1 and 0 <= self.smoothing < 1):
            raise ValueError(f"warmup={self.warmup} and smoothing={self.smoothing} must lie in [0, 1)")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale} must be two rising fractions of the image's area")
        if not (0 <= self.erasing <= 1 and 0 <= self.drop_path < 1):
            raise ValueError(f"erasing={self.erasing} and drop_path={self.drop_path} must be probabilities")
        if self.base_lr <= 0 or min(self.mixup, self.cutmix, self.weight_decay) < 0:
            raise ValueError(
                f"base_lr={self.base_lr} must be positive; mixup={self.mixup}, cutmix={self.cutmix} and "
                f"weight_decay={self.weight_decay} must not be negative"
            )


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


@dataclass(frozen=True)
class Examples:
    """The labelled, readable samples of a data set."""

    folder: Path
    index: Int[Tensor, " n"]  # of the samples in the data set


class Classifier(nn.Module):
    """Encoder, mean of its tokens, linear head without a norm: images [b, 3, s, s] -> logits [b, k].

    The encoder is a trainable copy that stays in eval mode, so that no statistics move, but for its DropPaths where
    the classifier `drops` branches. The head starts from zero.
    """

    def __init__(self, encoder: nn.Module, num_categories: int, *, drops: bool = False) -> None:
        super().__init__()
        self.drops = drops  # branches, in training; else the encoder's own rates are passed over
        self.encoder = copy.deepcopy(encoder).requires_grad_(True).eval()
        self.head = nn.Linear(encoder.width, num_categories)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b k"]:
        return self.head(self.encoder(images).mean(dim=1))

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        self.encoder.eval()
        for module in self.encoder.modules():
            if isinstance(module, DropPath):
                module.train(mode and self.drops)
        return self

    def group_matcher(self, coarse: bool) -> Callable[[str], float]:
        """Name of a parameter -> place of its layer; what `param_groups_layer_decay` of timm asks a model for."""
        order = {f"encoder.{name}": float(layer) for name, layer in layer_order(self.encoder).items()}
        return lambda name: order.get(name, math.inf)

    def groups(self, settings: FineTune) -> list[dict]:
        """Parameter groups with `lr_scale`, the rate of a layer / that of the head."""
        exempt = {f"encoder.{name}" for name in names_without_decay(self.encoder)}
        return param_groups_layer_decay(self, settings.weight_decay, exempt, layer_decay=settings.layer_decay)


def fine_tune(
    towers: nn.Module,
    run: Run,
    train: Examples,
    num_categories: int,
    settings: FineTune,
    *,
    device: torch.device,
    workers: int = 0,
    title: str = "fine-tuning",
) -> Classifier:
    """The classifier after the last epoch; nothing is selected by held-out images.

    Float32; on a CPU one seed gives the same bits. `towers`, which are on `device`, stay as they are. Raises
    NotMeasured when the loss is not finite and for an encoder of unknown layers, ValueError with fewer than two
    training images.
    """
    num_images = len(train.index)
    if num_images < 2:
        raise ValueError(f"{train.folder} has {num_images} labelled image, fine-tuning needs two or more")
    batch = min(settings.batch, num_images - num_images % 2)
    steps_an_epoch = num_images // batch
    steps = settings.epochs * steps_an_epoch
    peak = settings.base_lr * math.sqrt(batch / BASE_BATCH)
    encoder = _encoder(towers, run, settings.drop_path)
    model = Classifier(encoder, num_categories, drops=settings.drop_path > 0).to(device).train()
    try:
        groups = model.groups(settings)
    except UnknownOrder as error:
        raise NotMeasured(f"each layer has a rate of its own, and {error}") from error
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=settings.betas)
    mix = Mixup(
        settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=num_categories
    )
    mix.mixup_enabled = settings.mixup > 0 or settings.cutmix > 0
    erase = RandomErasing(settings.erasing, mode="pixel", device=device) if settings.erasing else None
    with seeded(settings.seed), tqdm(total=steps, desc=title, unit=" step", mininterval=1.0) as bar:
        for epoch in range(settings.epochs):
            total = torch.zeros((), device=device)
            for views, labels in _augmented(train, run, settings, epoch, batch, workers):
                rate = warm_cosine(bar.n, steps, round(settings.warmup * steps), peak, 0.0)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["lr_scale"]
                images = normalise(views.to(device), run.views.mean, run.views.std, torch.float32)
                if erase is not None:
                    with seeded(settings.seed * 1_000_003 + bar.n):
                        images = erase(images)
                images, targets = mix(images, labels.to(device))
                loss = F.cross_entropy(model(images), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
                bar.update()
            mean = float(total) / steps_an_epoch
            bar.set_postfix_str(f"epoch {epoch + 1}, {mean:.3f} nats")
            if not math.isfinite(mean):
                raise NotMeasured(f"the loss of fine-tuning was {mean} in epoch {epoch + 1}")
    return model.eval()


def _encoder(towers: nn.Module, run: Run, drop_path: float) -> nn.Module:
    """The towers' encoder, built again where it shall drop branches."""
    if not drop_path:
        return towers.encoder
    if isinstance(towers.encoder, PublishedEncoder):
        raise NotMeasured(
            f"drop_path={drop_path} needs an encoder that can be built anew: fine-tune the run's checkpoint, or by "
            "the small recipe"
        )
    backbone = replace(run.backbone, drop_path=drop_path, drop_path_schedule="linear")
    with seeded(0):  # of weights that are overwritten
        encoder = build_encoder(backbone, run.views.size).eval()
    encoder.fold_norm()
    encoder.load_state_dict(towers.encoder.state_dict())
    return encoder


@torch.inference_mode()
def predict(
    model: Classifier, run: Run, heldout: Examples, *, device: torch.device, workers: int = 0
) -> Int[Tensor, " n"]:
    """Categories that the classifier says of the center views of the examples, in their order."""
    pictures = Pictures(heldout.folder, run.views.size)
    predicted = [
        model(normalise(views.to(device), run.views.mean, run.views.std, torch.float32)).argmax(dim=1).cpu()
        for views, _ in _batches(pictures, heldout.index.tolist(), IMAGES_AT_ONCE, workers, False)
    ]
    return torch.cat(predicted)


def _augmented(
    train: Examples, run: Run, settings: FineTune, epoch: int, batch: int, workers: int
) -> Iterator[tuple[UInt8[Tensor, "b 3 s s"], Int[Tensor, " b"]]]:
    """Whole batches of one epoch in its own order; what is left over comes in another epoch."""
    view = partial(_augment, run=run, settings=settings, epoch=epoch)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = train.index[torch.randperm(len(train.index), generator=generator)].tolist()
    yield from _batches(Pictures(train.folder, run.views.size, view=view), order, batch, workers, True)


def _augment(
    image: UInt8[Tensor, "h w 3"], index: int, *, run: Run, settings: FineTune, epoch: int
) -> UInt8[Tensor, "3 s s"]:
    seed = f"{settings.seed}/{epoch}/{index}"
    generator = Random(seed)
    is_flipped = generator.random() < settings.flip
    box = draw_crop(image.shape[0], image.shape[1], settings.scale, run.views.ratio, generator)
    view = cut(image, box, is_flipped, run.views.size)
    if not settings.rand_augment:
        return view
    return rand_augment(view, settings.rand_augment, run.views.mean, generator.getrandbits(32))


def _batches(
    pictures: Pictures, order: list[int], batch: int, workers: int, drop_last: bool
) -> Iterator[tuple[UInt8[Tensor, "b 3 s s"], Int[Tensor, " b"]]]:
    loader = DataLoader(
        Subset(pictures, order), batch, num_workers=workers, drop_last=drop_last, collate_fn=list
    )
    for found in loader:
        yield torch.stack([p.view for p in found]), torch.tensor([p.label for p in found])
