"""How do several ranks read one data set together? Each a share of the images; the first rank gets all features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.collectives import rank, sendable, to_first_rank, world_size
from pretrain.data.faults import check_bad_share
from pretrain.evaluate import dense
from pretrain.evaluate.cached import CachedTokens
from pretrain.evaluate.features import REMEDY, Features, NoneReadable

TIMEOUT = timedelta(days=1)  # of a rank that the others wait for while all read images
PATIENCE = timedelta(
    days=3650
)  # with the first rank, which trains probes alone: gloo tells when it has ended

T = TypeVar("T")


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


def gathered(work: Callable[[], Features], max_bad: float, folder: Path) -> Features | None:
    """What `work` gives of `folder` on all ranks, in the order of the ranks, on the first; None on the others.

    A collective call. An error (ValueError, OSError) of one rank is raised by all; whether more than a share of
    `max_bad` is unreadable is judged of all images together.
    """
    if world_size() == 1:
        return work()
    share = share_of(work)
    counts: list[Any] = [None] * world_size()
    dist.all_gather_object(counts, share.counts)
    try:
        dropped = judge(counts, max_bad, folder)
    except ValueError as error:
        raise error from share.problem
    parts = to_first_rank(share.features)
    if parts is None:
        return None
    return replace(join([part for part in parts if part is not None]), dropped=dict(dropped))


def by_first_rank(work: Callable[[], T]) -> T | None:
    """What `work` gives on the first rank, None on the others, which wait for as long as it takes, or lives.

    A collective call. An OSError or ValueError of it is raised by all; RuntimeError on the others when the first rank
    has ended.
    """
    outcome, problem = None, None
    group = _patient() if world_size() > 1 else None
    if rank() == 0:
        try:
            outcome = work()
        except (OSError, ValueError) as error:
            problem = error
    if group is not None:
        told = [None if problem is None else sendable(problem)]
        dist.broadcast_object_list(told, group=group)
        problem = problem or told[0]
    if problem is not None:
        raise problem
    return outcome


@cache
def _patient() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def join(parts: Sequence[Features]) -> Features:
    """Features of shares of a data set as those of the whole."""
    masked = [part.dense for part in parts if part.dense is not None]
    cached = [part.cached for part in parts if part.cached is not None]
    return Features(
        tokens=torch.cat([part.tokens for part in parts]),
        embedding=_cat([part.embedding for part in parts]),
        projected=_cat([part.projected for part in parts]),
        classified=_cat([part.classified for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        captions=[captions for part in parts for captions in part.captions],
        index=torch.cat([part.index for part in parts]),
        dropped=dict(sum((Counter(part.dropped) for part in parts), Counter())),
        dense=dense.joined(masked) if masked else None,
        layers={name: torch.cat([part.layers[name] for part in parts]) for name in parts[0].layers},
        cached=CachedTokens(torch.cat([c.tokens for c in cached]), torch.cat([c.index for c in cached]))
        if cached
        else None,
    )


def _cat(values: Sequence[Tensor | None]) -> Tensor | None:
    return None if values[0] is None else torch.cat(values)
