"""Do the features of a run collapse? What a step saw of every target, measured over the ranks, and the verdict.

Monitor asks at every logged step, the report from the log; both by the same limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pretrain.collectives import gather_rows, mean_over_ranks, world_size
from pretrain.config import Run

MAX_ROWS = 4096  # images of the global batch that are gathered: enough for any width, and a bound on the time
MIN_ROWS = 8  # fewer images cannot tell a small spread from a small sample
STEPS_IN_A_ROW = 3  # logged steps with a value below its limit that make a collapse
# Until then nothing is judged: features of an encoder that has learnt nothing may lie below the limit. In `m3i.demo`
# they begin at 0.030 where it is 0.044, and pass it in the first 30 to 50 steps.
WARMUP = 0.05  # of all steps
FEWEST_STEPS = 100
LEARNING = ("ema", "learned")  # encoders that training can bring to collapse

Measured = Mapping[str, float]  # quantity -> value of one target at one logged step, as in the log


@dataclass(frozen=True)
class Seen:
    """What a step saw of one target on this rank, detached: a row an image."""

    target: Float[Tensor, "n d"]  # z_y, pooled over patches where there are patches
    prediction: Float[Tensor, "n d"] | None = None  # of the same images, pooled alike; None in another space
    codes: Float[Tensor, "n k"] | None = None  # assignments over codes or prototypes, 1 a row; None without


def measure(seen: Mapping[str, Seen]) -> dict[str, dict[str, float]]:
    """Target -> quantity -> value over the images of all ranks: `std`, `effective_rank`, `agreement` where there
    is a prediction, `code_entropy` where there are codes, and the counts `rows`, `width` and `codes`.

    A collective call that waits for the device: names and n are equal on all ranks. Of more than MAX_ROWS
    images, the first of every rank are measured; `code_entropy` takes all of them.
    """
    values: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, dict[str, int]] = {}
    for name, one in seen.items():
        target = _gathered(one.target)
        values[name] = {"std": batch_std(target), "effective_rank": effective_rank(target)}
        counts[name] = {"rows": target.shape[0], "width": target.shape[1]}
        if one.prediction is not None:
            values[name]["agreement"] = agreement(_gathered(one.prediction), target)
        if one.codes is not None:
            values[name]["code_entropy"] = entropy(mean_over_ranks(one.codes.float().mean(dim=0)))
            counts[name]["codes"] = one.codes.shape[1]
    if not values:
        return {}
    told = iter(torch.stack([value for of_one in values.values() for value in of_one.values()]).tolist())
    return {name: {quantity: next(told) for quantity in values[name]} | counts[name] for name in values}


def _gathered(rows: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    return gather_rows(rows[: max(MAX_ROWS // world_size(), 1)].float())


def batch_std(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Standard deviation over the batch of unit-normalised features, mean over dimensions.

    About 1 / sqrt(d) for features spread over the sphere, 0 after collapse and for a single image (SimSiam,
    arXiv 2011.10566).
    """
    return F.normalize(features.detach().float(), dim=-1).std(dim=0, correction=0).mean()


def effective_rank(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Number of directions that the features use: exp of the entropy of the singular values, divided by their
    sum, of the rows minus their mean. In [1, most_rank(n, d)]; 1 for equal rows, NaN if a value is not finite.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    rows = features.detach().float()
    finite = rows.isfinite().all()
    rows = rows.nan_to_num(0.0, 0.0, 0.0)
    # What subtracting the mean leaves of equal rows is rounding and no direction.
    rounding = 16 * torch.finfo(rows.dtype).eps * torch.linalg.matrix_norm(rows)
    singular = torch.linalg.svdvals(rows - rows.mean(dim=0))
    singular = torch.where(singular > rounding, singular, 0.0)
    share = singular / singular.sum().clamp(min=torch.finfo(rows.dtype).tiny)
    return torch.where(finite, entropy(share).exp(), torch.nan)


def agreement(prediction: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean cosine of a prediction and the target of its own image, minus that with the targets of all other images.

    Near 1 when every prediction meets its own, spread target; 0 when image and target have nothing in common:
    for constant features, whatever their cosine, and for a single image, which has no others.
    """
    n = len(target)
    if n == 1:
        return target.new_zeros((), dtype=torch.float32)
    p, t = (F.normalize(z.detach().float(), dim=-1) for z in (prediction, target))
    own, every = (p * t).sum(), p.sum(dim=0) @ t.sum(dim=0)
    return own / n - (every - own) / (n * (n - 1))


def entropy(share: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """Nats of a distribution, 0 log 0 = 0: ln k when it is even, 0 when one takes all."""
    return torch.special.entr(share).sum()


def most_rank(rows: int, width: int) -> int:
    """The largest effective rank: centred rows span at most rows - 1 directions."""
    return max(min(rows - 1, width), 1)


@dataclass(frozen=True)
class Scale:
    """Between what a quantity lies: `best` when the features use all they have, collapsed below `limit`."""

    best: float
    limit: float


def scales(measured: Measured) -> dict[str, Scale]:
    """Scale of every quantity that a collapse shows in; THE limits of monitor and report.

    Half of 1 / sqrt(width) for `std`; 5 % of the most directions for `effective_rank`, but 2 of them, or half of
    them where they are few; 10 % of ln k for `code_entropy`.
    """
    spread = 1 / math.sqrt(measured["width"])
    most = most_rank(int(measured["rows"]), int(measured["width"]))
    found = {
        "std": Scale(spread, spread / 2),
        "effective_rank": Scale(most, min(max(2.0, 0.05 * most), most / 2)),
    }
    if "codes" in measured:
        even = math.log(measured["codes"])
        found["code_entropy"] = Scale(even, 0.1 * even)
    return found


def below_limit(measured: Measured) -> dict[str, tuple[float, float]]:
    """Quantity -> (value, limit) of what lies below its limit; nothing for fewer than MIN_ROWS images."""
    if measured["rows"] < MIN_ROWS:
        return {}
    found = {quantity: (measured[quantity], scale.limit) for quantity, scale in scales(measured).items()}
    return {quantity: (value, limit) for quantity, (value, limit) in found.items() if value < limit}


@dataclass(frozen=True)
class Collapse:
    """A target that collapsed, with what lay below its limit when that was clear: quantity -> (value, limit)."""

    target: str
    since: int  # the first of the logged steps in a row
    low: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        values = ", ".join(
            f"{name} {value:.3g}, limit {limit:.3g}" for name, (value, limit) in self.low.items()
        )
        return f"target {self.target}: {values}, since step {self.since}"


def judged_after(run: Run) -> int:
    """The step up to which low values are those of a beginning.

    After its warm-up the student has to learn, and the teacher, an average over 1 / (1 - momentum) steps, to follow.
    """
    moves_after = run.optim.warmup + round(1 / max(1 - run.teacher.momentum, 1 / run.steps))
    return max(moves_after, math.ceil(WARMUP * run.steps), FEWEST_STEPS)


def too_short(run: Run) -> str:
    """Why no step of a run can tell whether its features collapse; "" where enough of them do."""
    after = judged_after(run)
    judged = filter(run.is_logged, range(after + 1, run.steps + 1))
    if len(list(islice(judged, STEPS_IN_A_ROW))) == STEPS_IN_A_ROW:
        return ""
    few = f"and of {run.steps:,} fewer than {STEPS_IN_A_ROW} that are logged come later"
    return f"too short to tell: low values count after step {after:,}, {few}"


def can_collapse(run: Run, target: str) -> bool:
    """Does training change these features? Raw data, guides and tokenizers are what they are."""
    targets = run.objective.targets
    return target not in targets or targets[target].encoder in LEARNING


class Watch:
    """Follows the logged steps in their order and knows which targets are collapsed at present."""

    def __init__(self, run: Run) -> None:
        self._run = run
        # Target -> the latest logged steps in a row that speak against what is held of it.
        self._contrary: dict[str, list[int]] = {}
        self.collapsed: dict[str, Collapse] = {}
        self.recovered: list[str] = []  # by the latest logged step

    def judges(self, target: str, step: int) -> bool:
        """Does a low value of this target at this step count?"""
        return step > judged_after(self._run) and can_collapse(self._run, target)

    def after(self, step: int, measured: Mapping[str, Measured]) -> list[Collapse]:
        """Targets whose collapse this logged step makes clear; each is told once, unless it recovers in between."""
        new: list[Collapse] = []
        self.recovered = []
        for name, values in measured.items():
            low = below_limit(values) if self.judges(name, step) else {}
            is_contrary = bool(low) != (name in self.collapsed)
            steps = self._contrary[name] = [*self._contrary.get(name, []), step] if is_contrary else []
            if len(steps) < STEPS_IN_A_ROW:
                continue
            self._contrary[name] = []
            if low:
                self.collapsed[name] = Collapse(name, steps[0], low)
                new.append(self.collapsed[name])
            else:
                del self.collapsed[name]
                self.recovered.append(name)
        return new


def replay(run: Run, records: Iterable[Mapping[str, Any]]) -> Watch:
    """The watch after all lines of a log."""
    watch = Watch(run)
    for record in records:
        watch.after(record["step"], record.get("collapse") or {})
    return watch


SPREAD_REMEDY = (
    "predict labels beside it (targets of category or text), standardise over the batch "
    "(backbone.token_norm=batch, pool.norm=batch), slow the teacher down (teacher.momentum nearer to 1), or "
    "spread the target (its uniformity above 0, where it is dense and gaussian)"
)
CODE_REMEDY = "even the codes out (more clusters.iterations, a higher clusters.epsilon)"
REMEDIES = {"std": SPREAD_REMEDY, "effective_rank": SPREAD_REMEDY, "code_entropy": CODE_REMEDY}
FRAME = "!" * 110


def alarm(collapses: Iterable[Collapse]) -> str:
    """What the console says of collapsed targets, in a frame that no line of losses has."""
    collapses = list(collapses)
    remedies = dict.fromkeys(REMEDIES[quantity] for found in collapses for quantity in found.low)
    lines = [f"COLLAPSE: {found}" for found in collapses]
    lines += [f"what to do: {remedy}; then start anew with another --out" for remedy in remedies]
    return "\n".join([FRAME, *lines, FRAME])
