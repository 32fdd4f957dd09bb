"""How do several ranks read one data set together? Each keeps the features of its share of the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pretrain.collectives import world_size
from pretrain.data.faults import check_bad_share
from pretrain.evaluate.cached import CachedTokens
from pretrain.evaluate.dense import DenseFeatures
from pretrain.evaluate.features import REMEDY, Features, NoneReadable

TIMEOUT = timedelta(days=1)  # of a rank that the others wait for


@dataclass(frozen=True)
class Share:
    """What became of one rank's images."""

    features: Features | None  # None: none of them is readable, or there is none
    dropped: Counter[str]
    problem: Exception | None = None

    @property
    def counts(self) -> tuple[str | None, Counter[str], int]:
        """Problem, samples left out by reason, samples seen: what all ranks are told."""
        num_seen = 0 if self.features is None else len(self.features.index)
        return None if self.problem is None else str(self.problem), self.dropped, num_seen


def share_of(work: Callable[[], Features]) -> Share:
    """What `work` gives, or why it gives nothing."""
    try:
        found = work()
    except NoneReadable as error:
        return Share(None, error.dropped)
    except (ValueError, OSError) as error:
        return Share(None, Counter(), error)
    return Share(found, Counter(found.dropped))


def judge(
    counts: Sequence[tuple[str | None, Counter[str], int]], max_bad: float, folder: Path
) -> Counter[str]:
    """The samples left out of the whole data set; ValueError for a problem of one rank and for too many of them."""
    if told := [problem for problem, _, _ in counts if problem is not None]:
        raise ValueError(told[0])
    dropped = sum((dropped for _, dropped, _ in counts), Counter())
    num_seen = sum(num_seen for _, _, num_seen in counts)
    check_bad_share(dropped, num_seen + dropped.total(), max_bad, f"one of {folder}", remedy=REMEDY)
    if not num_seen:
        raise ValueError(f"{folder} has no readable image ({dict(dropped)}): build the data set again")
    return dropped


def divided(work: Callable[[], Features], max_bad: float, folder: Path) -> Features:
    """What `work` gives of `folder` on this rank, of no images where it has none; `dropped` is that of all ranks.

    A collective call. An error (ValueError, OSError) of one rank is raised by all; whether more than a share of
    `max_bad` is unreadable is judged of all images together.
    """
    if world_size() == 1:
        return work()
    share = share_of(work)
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, (share.counts, None if share.features is None else of_none(share.features)))
    try:
        dropped = judge([counts for counts, _ in told], max_bad, folder)
    except ValueError as error:
        raise error from share.problem
    forms = [form for _, form in told if form is not None]
    own = share.features or forms[0]
    return replace(
        own,
        dropped=dict(dropped),
        dense=own.dense or next((form.dense for form in forms if form.dense), None),
        cached=own.cached or next((form.cached for form in forms if form.cached), None),
    )


def of_none(features: Features) -> Features:
    """Features of the same kinds and widths, of no image."""
    return Features(
        tokens=_none(features.tokens),
        embedding=_none(features.embedding),
        projected=_none(features.projected),
        classified=_none(features.classified),
        labels=_none(features.labels),
        captions=[],
        index=_none(features.index),
        dropped={},
        dense=features.dense and dense_of_none(features.dense),
        layers={name: _none(values) for name, values in features.layers.items()},
        cached=features.cached and CachedTokens(_none(features.cached.tokens), _none(features.cached.index)),
    )


def dense_of_none(dense: DenseFeatures) -> DenseFeatures:
    return replace(
        dense, tokens=_none(dense.tokens), places=_none(dense.places), classes=_none(dense.classes), kinds=()
    )


def _none(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.new_empty(0, *values.shape[1:])
