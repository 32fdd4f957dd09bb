"""How do several ranks read one data set together? Each a share of the images; the first rank gets all features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.collectives import rank, world_size
from pretrain.evaluate import dense
from pretrain.evaluate.cached import CachedTokens
from pretrain.evaluate.features import Features

TIMEOUT = timedelta(days=1)  # ranks that have nothing left to do wait for the first, which trains probes


def gathered(work: Callable[[], Features]) -> Features | None:
    """What `work` gives on all ranks, in the order of the ranks, on the first; None on the others.

    A collective call. An error (ValueError, OSError) of one rank is raised by all.
    """
    if world_size() == 1:
        return work()
    part, problem = None, None
    try:
        part = work()
    except (ValueError, OSError) as error:
        problem = error
    problems: list[Any] = [None] * world_size()
    dist.all_gather_object(problems, None if problem is None else str(problem))
    told = [text for text in problems if text is not None]
    if told:
        raise ValueError(told[0]) from problem
    parts = [None] * world_size() if rank() == 0 else None
    dist.gather_object(part, parts)
    return None if parts is None else join(parts)


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
