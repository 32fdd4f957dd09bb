"""How are linear heads trained on frozen features by the paper's recipe, many together in one pass?

Source of the recipe: M3I (arXiv 2211.09807), appendix, linear probe on ImageNet-1k: LARS, rate 3.2 at a batch of
16,384, no weight decay, 90 epochs, 10 of them warm-up, cosine; the momentum is MAE's (arXiv 2111.06377, appendix
A.1). Two things differ: features are cached, so that no crop or flip varies them, and their standardisation (a batch
norm without affine, as in MAE) takes the statistics of all training images. A set of fewer images has smaller batches
and their rate as it is: the layer-wise trust ratio of LARS makes a step a share of the weights, whatever the batch.
Several ranks train one set of heads: each has the features of its share of the images, and of each batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.optim import Lars
from torch import Tensor, nn
from tqdm import tqdm

from pretrain.collectives import average_gradients, rank, world_size
from pretrain.evaluate.divided import division, moments, step_rows
from pretrain.evaluate.fine_tune_recipes import images_of_step
from pretrain.optim import warm_cosine


@dataclass(frozen=True)
class LinearRecipe:
    epochs: int = 90
    warmup: int = 10  # epochs
    batch: int = 16_384  # images; of a smaller set a share
    batches: int = 16  # at least, of an epoch, as long as they hold 32 images
    lr: float = 3.2  # peak
    momentum: float = 0.9
    seed: int = 0  # of the first weights and the order


PAPER = LinearRecipe()
# A grid around the paper's rate, as DINO's of 13 rates (arXiv 2104.14294, released evaluation).
RATES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)


@dataclass(frozen=True)
class Head:
    """A linear layer on standardised features."""

    feature: str
    lr: float
    mean: Float[Tensor, " d"]
    deviation: Float[Tensor, " d"]
    weight: Float[Tensor, "d k"]
    bias: Float[Tensor, " k"]

    def predict(self, features: Mapping[str, Float[Tensor, "n _"]]) -> Int[Tensor, " n"]:
        standard = (features[self.feature] - self.mean) / self.deviation
        return (standard @ self.weight + self.bias).argmax(dim=1)


def train_heads(
    features: Mapping[str, Float[Tensor, "n _"]],
    labels: Int[Tensor, " n"],
    num_categories: int,
    rates: Sequence[float],
    recipe: LinearRecipe = PAPER,
    device: torch.device | str = "cpu",
) -> list[Head]:
    """A head for each of the features and rates, by the mean cross-entropy in nats of each alone; float32.

    All see the same batches; none feels another, since every head has weights, and so a trust ratio, of its own. A
    collective call: a rank gives its share of the images, any number of them, and gets all heads.
    """
    groups, stacks = [], {}
    for name, values in features.items():
        mean, variance = moments(values)
        mean, deviation = mean.float(), variance.sqrt().clamp(min=1e-6).float()
        first = torch.empty(values.shape[1], num_categories)
        # The same for every rate, and whatever the other features are.
        nn.init.trunc_normal_(first, std=0.01, generator=torch.Generator().manual_seed(recipe.seed))
        weights = [nn.Parameter(first.clone().to(device)) for _ in rates]
        biases = [nn.Parameter(torch.zeros(num_categories, device=device)) for _ in rates]
        stacks[name] = (weights, biases, mean, deviation)
    for place, rate in enumerate(rates):
        for tensors, adapts in ((0, True), (1, False)):
            # Without weight decay timm's LARS adapts what it is told to: weights, not biases.
            own = [stack[tensors][place] for stack in stacks.values()]
            groups.append({"params": own, "peak": rate, "always_adapt": adapts})
    optimizer = Lars(groups, lr=recipe.lr, momentum=recipe.momentum)
    divided = division(len(labels))
    batch = images_of_step(divided.total, recipe.batch, recipe.batches)
    an_epoch = divided.total // batch
    steps = recipe.epochs * an_epoch
    bar = tqdm(
        step_rows(divided, batch, recipe.epochs, recipe.seed),
        total=steps,
        desc="linear heads",
        unit=" step",
        mininterval=1.0,
        disable=rank() > 0,
    )
    for step, rows in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = warm_cosine(step, steps, recipe.warmup * an_epoch, group["peak"], 0.0)
        targets = labels[rows, None].expand(-1, len(rates)).to(device)
        loss = sum(_loss(features[name][rows], targets, *stack) / batch for name, stack in stacks.items())
        optimizer.zero_grad()
        (
            loss * world_size()
        ).backward()  # the mean of such gradients over the ranks is that of the batch's mean
        average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        optimizer.step()  # trust ratios are those of the whole batch
    return [
        Head(name, rate, mean, deviation, weight.detach().cpu(), bias.detach().cpu())
        for name, (weights, biases, mean, deviation) in stacks.items()
        for rate, weight, bias in zip(rates, weights, biases, strict=True)
    ]


def _loss(
    some: Float[Tensor, "b d"],
    targets: Int[Tensor, "b r"],
    weights: list[nn.Parameter],
    biases: list[nn.Parameter],
    mean: Float[Tensor, " d"],
    deviation: Float[Tensor, " d"],
) -> Float[Tensor, ""]:
    """Sum over images, and over the r heads that read one of their features, of the cross-entropy in nats."""
    standard = ((some - mean) / deviation).to(targets.device)
    logits = standard @ torch.cat(weights, dim=1) + torch.cat(biases)
    by_head = logits.unflatten(1, (len(weights), len(biases[0]))).transpose(1, 2)
    return F.cross_entropy(by_head, targets, reduction="sum")


def selection_split(
    labels: Int[Tensor, " n"], share: float = 0.2, seed: int = 0
) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Rows to train on and rows to choose by, of a training set: `share` of each category, of a single image none."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for category in labels.unique().tolist():
        rows = (labels == category).nonzero()[:, 0]
        order = rows[torch.randperm(len(rows), generator=generator)]
        count = round(share * len(rows)) if len(rows) > 2 else len(rows) - 1
        chosen.append(order[: max(count, min(len(rows) - 1, 1))])
    is_chosen = torch.zeros(len(labels), dtype=torch.bool)
    is_chosen[torch.cat(chosen)] = True
    return (~is_chosen).nonzero()[:, 0], is_chosen.nonzero()[:, 0]
