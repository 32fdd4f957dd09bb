"""How well does a linear classifier on frozen features tell the categories?

Multinomial logistic regression on standardised features, by scikit-learn as long as that is a matter of minutes. A
larger set has the same objective minimised by the same solver (SciPy's L-BFGS-B), whose loss and gradient the device
computes in float32, some rows at once: ImageNet-1k needs no copy of its features in float64. Several ranks each sum
them over their share of the images; a small set comes to the first rank.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from scipy.optimize import OptimizeResult, minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from pretrain.collectives import all_rows, from_first_rank, to_first_rank
from pretrain.evaluate.divided import Ask, division, led, moments
from pretrain.evaluate.evidence import NotMeasured

C = 0.1  # inverse L2 penalty on standardised features; fixed, so that no checkpoint is tuned more than another
MAX_ITERATIONS = 2000  # of L-BFGS; it stops by its own tolerance long before
MOST_VALUES = 2**22  # images x width that scikit-learn is given: 5,461 images of 768 numbers
ROWS_AT_ONCE = 2**15  # images whose logits are computed together on the device
SOLVERS = ("scikit-learn, float64", "L-BFGS, float32")  # of small and of large sets
GRADIENT = 1e-4  # largest slope of the mean loss where it ends, as scikit-learn has it
ROUNDED = 1e-3  # the same, where no step of float32 leads further down
DECREASE = 1e-9  # of the loss, relative, below which float32 tells no more


def solver_of(num_images: int, width: int) -> str:
    """Which of SOLVERS a training set of this size is given."""
    return SOLVERS[num_images * width > MOST_VALUES]


def linear_probe(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    heldout: Float[Tensor, "m d"],
    device: torch.device | str = "cpu",
) -> Int[Tensor, " m"]:
    """Predicted categories of `heldout` by multinomial logistic regression on standardised training features.

    `device` is that of large sets. A collective call: a rank gives its share of training and held-out images. Raises
    NotMeasured, on all ranks, when the training images show fewer than two categories, and when the solver does not
    come to its minimum.
    """
    shown = all_rows(labels)
    if len(shown.unique()) < 2:
        raise NotMeasured(
            f"the training images show {len(shown.unique())} category, a linear probe needs two or more"
        )
    if solver_of(len(shown), train.shape[1]) == SOLVERS[1]:
        return Large(train, labels, device).fit().predict(heldout)
    parts = to_first_rank(train)
    probe = from_first_rank(lambda: _small(torch.cat(parts), shown))
    if isinstance(probe, str):
        raise _unsolved(probe)
    if not len(heldout):  # of which scikit-learn wants at least one
        return heldout.new_empty(0, dtype=torch.long)
    return torch.from_numpy(probe.predict(heldout.double().numpy()))


def _small(train: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Pipeline | str:
    """scikit-learn's probe, or why it has not come to its minimum."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        # One image a category, as few labels have it, makes scikit-learn ask whether the labels are quantities:
        # https://github.com/scikit-learn/scikit-learn/pull/26335
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        warnings.filterwarnings("error", category=ConvergenceWarning)
        try:
            return probe.fit(train.double().numpy(), labels.numpy())
        except ConvergenceWarning as told:
            return str(told).partition(":\n")[0]


class Large:
    """scikit-learn's objective over rows that are looked at some at once: the mean cross-entropy in nats, and the
    squares of the weights over 2 C n; of two categories one has no weights. The rows are those of all ranks, of which
    each has its own, and all make and `fit` one together.
    """

    def __init__(
        self, train: Float[Tensor, "n d"], labels: Int[Tensor, " n"], device: torch.device | str
    ) -> None:
        self.train, self.device = train, device
        self.classes = all_rows(labels).unique()
        self.targets = torch.searchsorted(self.classes, labels)
        self.num_images = division(len(labels)).total
        self.shape = (train.shape[1] + 1, len(self.classes) if len(self.classes) > 2 else 1)  # last row: bias
        self.mean, self.deviation = _statistics(train)
        self.weights = torch.zeros(self.shape, device=device)

    def fit(self) -> Large:
        """Itself, at the minimum; NotMeasured where the solver does not come to it."""
        found = led(self._minimised, self._sums, self.shape[0] * self.shape[1])
        slope = np.abs(found.jac).max()
        if not found.success and not slope < ROUNDED:
            raise _unsolved(f"{found.message} after {found.nit} iterations, slope {slope:.2g}")
        self.weights = self._weights(found.x)
        return self

    def predict(self, features: Float[Tensor, "m d"]) -> Int[Tensor, " m"]:
        said = [
            self._logits(self._standard(rows)).argmax(dim=1).cpu() for rows in features.split(ROWS_AT_ONCE)
        ]
        return self.classes[torch.cat(said)]

    def _minimised(self, ask: Ask) -> OptimizeResult:
        options = {"maxiter": MAX_ITERATIONS, "maxls": 50, "gtol": GRADIENT, "ftol": DECREASE}
        with tqdm(desc="linear probe", unit=" iteration", mininterval=1.0) as bar:
            found = minimize(
                lambda flat: self._loss(flat, ask),
                np.zeros(self.shape).ravel(),
                method="L-BFGS-B",
                jac=True,
                options=options,
                callback=lambda _: bar.update() and None,
            )
        found.pop("hess_inv")  # which is large, and of no use to the other ranks
        return found

    def _loss(self, flat: Float64[np.ndarray, " p"], ask: Ask) -> tuple[float, Float64[np.ndarray, " p"]]:
        total, *_ = sums = ask(torch.from_numpy(flat.copy()))
        n, matrix = self.num_images, flat.reshape(self.shape)[:-1]
        slopes = (sums[1:] / n).reshape(self.shape).numpy()
        slopes[:-1] += matrix / (C * n)
        return float(total) / n + float(np.square(matrix).sum() / (2 * C * n)), slopes.ravel()

    def _sums(self, flat: Float64[Tensor, " p"]) -> Float64[Tensor, " q"]:
        """Cross-entropy and its gradient, summed over this rank's rows."""
        self.weights = self._weights(flat.numpy())
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        gradient = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        for rows, targets in zip(
            self.train.split(ROWS_AT_ONCE), self.targets.split(ROWS_AT_ONCE), strict=True
        ):
            standard, targets = self._standard(rows), targets.to(self.device)
            logits = self._logits(standard)
            total += F.cross_entropy(logits, targets, reduction="sum")
            slope = logits.softmax(dim=1)
            slope[torch.arange(len(rows), device=self.device), targets] -= 1
            slope = slope[:, -self.shape[1] :]
            gradient[:-1] += standard.T @ slope
            gradient[-1] += slope.sum(dim=0)
        return torch.cat([total[None], gradient.ravel()]).cpu()

    def _weights(self, flat: Float64[np.ndarray, " p"]) -> Float[Tensor, "e k"]:
        return torch.from_numpy(flat.reshape(self.shape)).to(self.device, torch.float32)

    def _standard(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return ((rows - self.mean) / self.deviation).to(self.device)

    def _logits(self, standard: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        logits = standard @ self.weights[:-1] + self.weights[-1]
        return logits if self.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], dim=1)


def _unsolved(told: str) -> NotMeasured:
    return NotMeasured(f"the solver of the linear probe did not come to its minimum ({told})")


def _statistics(values: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Mean and deviation over all ranks, 1 where a feature is constant."""
    mean, variance = moments(values)
    eps = torch.finfo(torch.float32).eps
    is_constant = variance <= (eps * mean).square()
    return mean.float(), variance.sqrt().masked_fill(is_constant, 1.0).float()
