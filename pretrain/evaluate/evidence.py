"""What may a probe read of one checkpoint, and what does it give?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pretrain.collectives import all_rows, sum_over_ranks
from pretrain.data.batch import NO_CATEGORY
from pretrain.evaluate import zero_shot
from pretrain.evaluate.divided import ROWS_AT_ONCE
from pretrain.evaluate.features import Features
from pretrain.evaluate.rows import MOST_IMAGES
from pretrain.evaluate.templates import AUTO
from pretrain.facts import DataFacts

CPU = torch.device("cpu")


class NotMeasured(Exception):
    """A probe has nothing to measure here; the message says why, and stands in the result."""


@dataclass(frozen=True)
class Evidence:
    """What every probe may read. Each rank has the features of its share of the images; the rest is alike."""

    train: Features
    heldout: Features
    categories: tuple[str, ...]  # of the data set, train and held-out alike
    facts: DataFacts  # of the run
    ks: tuple[int, ...]  # neighbours of kNN; the first stands for the row
    encode: zero_shot.Encode | None  # the run's tokenizer; None without text
    embed: zero_shot.EmbedTexts  # the run's text tower
    templates: str = AUTO  # of zero-shot classification
    device: torch.device = CPU  # of probes that are trained step by step
    retrieval_images: int = MOST_IMAGES  # that compete, at most
    without_text: str = ""  # why nothing makes tokens, where that is known
    without_heads: str = ""  # why there is no embedding or category head, where not the run is the reason
    kept: dict[str, Any] = field(default_factory=dict)  # what one probe leaves for another


@dataclass(frozen=True)
class Outcome:
    record: dict[str, Any]  # of the JSON result
    predicted: Int[Tensor, " n"] | None = (
        None  # for the labelled held-out images of all ranks, in their order
    )


def outcome_of(measurement: Callable[[], Outcome]) -> Outcome:
    """What a measurement gives, or the reason why it gives nothing."""
    try:
        return measurement()
    except NotMeasured as reason:
        return unmeasured(str(reason))


def unmeasured(reason: str) -> Outcome:
    return Outcome({"accuracy": None, "reason": reason})


def not_finite(evidence: Evidence) -> str:
    """Why no probe can read the features, where some of them are not finite, as of weights that overflow.

    A comparison with them says nothing, and would pass for a measurement. Alike on all ranks; a collective call.
    """
    for which, split in (("training", evidence.train), ("held-out", evidence.heldout)):
        found = (split.tokens, split.embedding, split.projected, *split.layers.values())
        is_bad = torch.zeros(len(split.tokens), dtype=torch.bool)
        for values in found:
            if values is not None:
                is_bad |= torch.cat([~rows.isfinite().all(dim=1) for rows in values.split(ROWS_AT_ONCE)])
        num_bad, num_all = sum_over_ranks(torch.tensor([int(is_bad.sum()), len(is_bad)])).tolist()
        if num_bad:
            return (
                f"the features of {num_bad} of {num_all} {which} images are not finite, which no probe reads: the "
                "training has diverged, or the checkpoint is damaged; name another one"
            )
    return ""


def heldout_labels(evidence: Evidence) -> Int[Tensor, " n"]:
    """Categories of the labelled held-out images of all ranks. A collective call."""
    for split in (evidence.train, evidence.heldout):
        if not evidence.categories or not sum_over_ranks(is_labelled(split).sum()):
            raise NotMeasured("the data set has no categories")
    return all_rows(evidence.heldout.labels[is_labelled(evidence.heldout)])


def of_labelled(evidence: Evidence, feature: str) -> Tensor:
    """Of this rank's held-out images."""
    return getattr(evidence.heldout, feature)[is_labelled(evidence.heldout)]


def is_labelled(split: Features) -> Tensor:
    return split.labels != NO_CATEGORY


def check_trained(evidence: Evidence, feature: str) -> None:
    if getattr(evidence.heldout, feature) is None:
        raise NotMeasured(evidence.without_heads or f"the run's targets train no {feature}")
