"""How well does a linear classifier on frozen tokens tell what lies below each of them?

Memory: the tokens of at most TRAIN.images x TRAIN.tokens and HELDOUT.images x all are kept, in float32: 2,000 x 64
and 500 x 196 tokens of width 768 take 0.4 and 0.3 GB. The fit takes as much as the first again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

from pretrain.collectives import all_rows, from_every_rank
from pretrain.evaluate.divided import Ask, division, led, moments
from pretrain.evaluate.masks import Mask
from pretrain.evaluate.regions import GROUND, count_pixels

PENALTY = (
    1e-3  # L2, on weights of standardised features; fixed, so that no checkpoint is tuned more than another
)
MAX_ITERATIONS = 100  # of L-BFGS
ROUNDING = 1e-6  # of float32: a deviation of this share of the mean is none
IMAGES_AT_ONCE = 32  # whose classes and logits are held pixel by pixel


@dataclass(frozen=True)
class Sampling:
    """Which tokens of a data set are kept."""

    images: int  # at most, spread evenly over the data set
    tokens: int | None  # at most, of one image, drawn at random; None: all
    seed: int = 0  # of the draw


TRAIN, HELDOUT, NOTHING = Sampling(2000, 64), Sampling(500, None), Sampling(0, 0)


@dataclass(frozen=True)
class DenseFeatures:
    """Tokens of the images that have a mask, and what lies below them, on the CPU."""

    tokens: Float[Tensor, "n m d"]
    places: Int[Tensor, "n m"]  # of a token in its image's grid, row by row
    classes: Int[Tensor, "n s s"]  # int16; GROUND, i = kinds[i - 1]
    kinds: tuple[str, ...]
    grid: int  # tokens along one side


def chosen_images(num_images: int, sampling: Sampling) -> frozenset[int]:
    """The sample numbers whose masks and tokens are read."""
    count = min(num_images, sampling.images)
    return frozenset(i * num_images // count for i in range(count))


class TokenCollector:
    """Gathers DenseFeatures from batches of tokens, in the order of the images."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._tokens: list[Tensor] = []
        self._places: list[Tensor] = []
        self._masks: list[Mask] = []
        self._grid = 0

    def add(self, tokens: Float[Tensor, "b l d"], masks: Sequence[Mask | None], index: Sequence[int]) -> None:
        """Keeps what is wanted of the images that have a mask; `index` are their numbers in the data set."""
        rows = [row for row, mask in enumerate(masks) if mask is not None]
        if not rows:
            return
        length = tokens.shape[1]
        self._grid = isqrt(length)
        assert self._grid**2 == length, f"{length} tokens are no square grid"
        drawn = [self._draw(index[row], length) for row in rows]
        places = torch.stack(drawn).sort(dim=1).values
        picked = tokens[torch.tensor(rows)[:, None], places]
        self._tokens.append(picked.float().cpu())
        self._places.append(places)
        self._masks += [masks[row] for row in rows]

    def _draw(self, number: int, length: int) -> Int[Tensor, " m"]:
        """Places of the tokens that an image keeps, whichever images came before."""
        generator = torch.Generator().manual_seed(self.sampling.seed * 1_000_003 + number)
        return torch.randperm(length, generator=generator)[: self.sampling.tokens]

    def collected(self) -> DenseFeatures | None:
        """None when no image had a mask."""
        if not self._masks:
            return None
        kinds = tuple(sorted({kind for mask in self._masks for kind in mask.kinds}))
        number = {kind: i + 1 for i, kind in enumerate(kinds)}
        classes = [
            torch.tensor([GROUND, *map(number.__getitem__, mask.kinds)], dtype=torch.int16)[
                mask.numbers.int()
            ]
            for mask in self._masks
        ]
        return DenseFeatures(
            torch.cat(self._tokens), torch.cat(self._places), torch.stack(classes), kinds, self._grid
        )


def dense_probe(train: DenseFeatures, heldout: DenseFeatures) -> tuple[Int[Tensor, "n 3 k"], tuple[str, ...]]:
    """Pixel counts of the held-out images (see `count_pixels`) and the names of the k classes, ground first.

    A multinomial logistic regression from a standardised training token to the shares that the classes have of its
    pixels; the logits of a held-out image are interpolated bilinearly to the pixels of its view. A collective call: a
    rank gives its share of the images, and gets the counts of all.
    """
    kinds = tuple(sorted(set(from_every_rank([*train.kinds, *heldout.kinds]))))
    num_classes = 1 + len(kinds)
    targets = [
        token_shares(classes, train.grid, num_classes).gather(
            1, places[..., None].expand(-1, -1, num_classes)
        )
        for classes, places in zip(
            _renumbered(train, kinds).split(IMAGES_AT_ONCE), train.places.split(IMAGES_AT_ONCE), strict=True
        )
    ]
    classifier = fit(train.tokens.flatten(0, 1), torch.cat(targets).flatten(0, 1))
    counts = [torch.zeros(0, 3, num_classes, dtype=torch.long)]
    for tokens, truth in zip(
        heldout.tokens.split(IMAGES_AT_ONCE), _renumbered(heldout, kinds).split(IMAGES_AT_ONCE), strict=True
    ):
        if not len(tokens):  # of a rank without images
            continue
        logits = classifier.logits(tokens).unflatten(1, (heldout.grid, heldout.grid)).permute(0, 3, 1, 2)
        fine = F.interpolate(logits, size=truth.shape[1:], mode="bilinear", align_corners=False)
        counts.append(count_pixels(fine.argmax(1), truth, num_classes))
    return all_rows(torch.cat(counts)), ("ground", *kinds)


def token_shares(classes: Int[Tensor, "n s s"], grid: int, num_classes: int) -> Float[Tensor, "n l k"]:
    """Share of the pixels below each token that each class has; tokens row by row."""
    size = classes.shape[-1]
    assert size % grid == 0, f"{size} pixels are no multiple of {grid} tokens"
    patch = size // grid
    cells = classes.unflatten(2, (grid, patch)).unflatten(1, (grid, patch)).transpose(2, 3).flatten(3)
    cells = cells.flatten(1, 2).long()  # [n, l, pixels]
    counts = torch.zeros(*cells.shape[:2], num_classes)
    return counts.scatter_add_(2, cells, torch.ones(()).expand(cells.shape)) / cells.shape[2]


@dataclass(frozen=True)
class Classifier:
    """A linear layer on standardised features."""

    mean: Float[Tensor, " d"]
    deviation: Float[Tensor, " d"]
    weight: Float[Tensor, "d k"]
    bias: Float[Tensor, " k"]

    def logits(self, features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        return (features - self.mean) / self.deviation @ self.weight + self.bias


def fit(features: Float[Tensor, "n d"], shares: Float[Tensor, "n k"]) -> Classifier:
    """The classifier with the least mean cross-entropy (nats) to the shares + PENALTY / 2 x its squared weights.

    Float32; L-BFGS from zero, without randomness. A collective call: a rank gives its share of the tokens.
    """
    mean, variance = moments(features)
    mean, deviation = mean.float(), variance.sqrt().float()
    # What is constant but for rounding is not blown up.
    deviation = torch.where(deviation > ROUNDING * mean.abs(), deviation, 1.0)
    standard = (features - mean) / deviation
    width, num_tokens = features.shape[1], division(len(features)).total
    shape = (width + 1, shares.shape[1])  # last row: bias

    def sums(flat: Float64[Tensor, " p"]) -> Float64[Tensor, " q"]:
        """This rank's part of the mean cross-entropy, and of its gradient."""
        matrix = flat.float().view(shape).requires_grad_()
        with torch.enable_grad():
            logits = standard @ matrix[:-1] + matrix[-1]
            value = F.cross_entropy(logits, shares, reduction="sum") / num_tokens
        value.backward()
        return torch.cat([value.detach()[None], matrix.grad.flatten()]).double()

    matrix = led(lambda ask: _minimum(ask, shape), sums, shape[0] * shape[1])
    return Classifier(mean, deviation, matrix[:-1], matrix[-1])


def _minimum(ask: Ask, shape: tuple[int, int]) -> Float[Tensor, "e k"]:
    """Weights and biases with the least loss and penalty."""
    matrix = torch.zeros(shape, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [matrix], max_iter=MAX_ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        value, *_ = told = ask(matrix.detach().double().flatten())
        weight = matrix.detach()[:-1]
        matrix.grad = told[1:].float().view(shape)
        matrix.grad[:-1] += PENALTY * weight
        return value.float() + PENALTY / 2 * weight.square().sum()

    optimizer.step(loss)
    return matrix.detach()


def _renumbered(features: DenseFeatures, kinds: tuple[str, ...]) -> Int[Tensor, "n s s"]:
    """The classes numbered by `kinds`, which hold those of the features."""
    table = torch.tensor([GROUND, *(kinds.index(kind) + 1 for kind in features.kinds)], dtype=torch.int16)
    return table[features.classes.int()]
