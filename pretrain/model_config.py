"""How large are the modules of a run, and how do they score? Frozen, typed data that checks itself; no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

MOST_TOKENS = 512  # positions of BERT (arXiv 1810.04805, section A.2)


def positive(owner: str, **values: float) -> None:
    """ValueError for the first value that is not above 0, or not finite, as a field of `owner`."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{owner}.{name}={value} must be positive")
        if value == math.inf:
            raise ValueError(f"{owner}.{name}={value} must be finite")


def fraction(owner: str, **values: float) -> None:
    """ValueError for the first value outside of [0, 1], as a field of `owner`."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{owner}.{name}={value} must lie in [0, 1]")


def require_finite(data: Any, name: str = "") -> None:
    """ValueError for the first float of a dataclass, or of what its fields hold, that is nan or infinite."""
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"{name}={data} must be a finite number: leave it out for the recipe's own")
    if dataclasses.is_dataclass(data):
        parts = {f".{one.name}": getattr(data, one.name) for one in dataclasses.fields(data)}
    elif isinstance(data, dict):
        parts = {f".{key}": value for key, value in data.items()}
    else:
        parts = {f"[{i}]": value for i, value in enumerate(data)} if isinstance(data, tuple) else {}
    for part, value in parts.items():
        require_finite(value, f"{name}{part}".removeprefix("."))


@dataclass(frozen=True)
class Backbone:
    family: str = "internimage"  # key of models.backbone.BACKBONES
    size: str = "internimage_h"  # a name of that family's table
    drop_path: float = 0.2  # probability that a residual branch is dropped, in [0, 1)
    drop_path_schedule: Literal["linear", "uniform"] = "uniform"  # over depth
    token_width: int = 1024  # InternImage: width of the token grid made from the last two stages
    token_norm: Literal["none", "batch"] = "none"  # batch: standardise tokens over the global batch
    # What of a block the backward pass computes again: nothing, the cheap parts, or all of it.
    activation_checkpoint: Literal["none", "selective", "full"] = "none"

    def __post_init__(self) -> None:
        positive("backbone", token_width=self.token_width)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"backbone.drop_path={self.drop_path} must lie in [0, 1)")


@dataclass(frozen=True)
class Decoder:
    """Transformer that predicts dense targets from owned tokens (M3I, table 7)."""

    layers: int = 4
    width: int = 1024
    ffn: int = 4096
    heads: int = 16

    def __post_init__(self) -> None:
        positive("decoder", layers=self.layers, width=self.width, ffn=self.ffn, heads=self.heads)
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"decoder.width={self.width} must be a multiple of decoder.heads={self.heads} and of 4"
            )


@dataclass(frozen=True)
class Pool:
    """Pooling from tokens to the embedding shared by category and text."""

    kind: Literal["attention", "mean"] = "attention"  # the mean token asks all tokens; or is taken as it is
    heads: int = 16  # of the attention
    width: int = 768  # of the embedding
    norm: Literal["none", "batch"] = (
        "none"  # batch: standardise the embedding over the global batch, then LayerNorm
    )

    def __post_init__(self) -> None:
        positive("pool", heads=self.heads, width=self.width)


@dataclass(frozen=True)
class Projection:
    """Global features that are targets: embedding -> hidden -> width, and the same once more to predict them."""

    hidden: int = 4096
    width: int = 256
    temperature: float = 0.2  # of the softmax over candidates, global and dense (MoCo v3, arXiv 2104.02057)
    dense_samples: int = 16  # patches an image whose dense features enter one softmax over the global batch

    def __post_init__(self) -> None:
        positive(
            "projection",
            hidden=self.hidden,
            width=self.width,
            temperature=self.temperature,
            dense_samples=self.dense_samples,
        )


@dataclass(frozen=True)
class Tags:
    """Decoder whose queries are the tags (Query2Label, arXiv 2107.10834), and its weighted asymmetric loss
    (HVP-MTL, arXiv 2310.07510, section 3.1).
    """

    layers: int = 2
    width: int = 768
    ffn: int = 3072
    heads: int = 4
    chunk: int = 1024  # tags decoded at once; the backward pass computes each such part again
    positive_weight: float = 10.0  # eta: factor of the loss of tags that an image has
    positive_focus: float = 4.0  # gamma+: power of 1 - p there
    negative_focus: float = 1.0  # gamma-: power of p at tags that it has not
    min_score: float = 0.5  # confidence from which the data's tag counts as one that the image has

    def __post_init__(self) -> None:
        positive(
            "tags",
            layers=self.layers,
            width=self.width,
            ffn=self.ffn,
            heads=self.heads,
            chunk=self.chunk,
            positive_weight=self.positive_weight,
        )
        fraction("tags", min_score=self.min_score)
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"tags.width={self.width} must be a multiple of tags.heads={self.heads} and of 4"
            )
        if min(self.positive_focus, self.negative_focus) < 0:
            raise ValueError(
                f"tags.positive_focus={self.positive_focus} and tags.negative_focus={self.negative_focus} must not "
                "be negative"
            )


@dataclass(frozen=True)
class Clusters:
    """Prototypes that both views of an image must share (SwAV, arXiv 2006.09882, section 4)."""

    prototypes: int = 3000
    hidden: int = 2048
    width: int = 128  # of the unit features that are compared with the prototypes
    temperature: float = 0.1  # of the softmax over prototypes
    epsilon: float = 0.05  # of the entropy in Sinkhorn's algorithm
    iterations: int = 3
    max_exponent: float = 10.0  # similarities / epsilon are cut there (HVP-MTL, section 3.2)

    def __post_init__(self) -> None:
        positive(
            "clusters",
            prototypes=self.prototypes,
            hidden=self.hidden,
            width=self.width,
            temperature=self.temperature,
            epsilon=self.epsilon,
            iterations=self.iterations,
            max_exponent=self.max_exponent,
        )


@dataclass(frozen=True)
class Text:
    """BERT-shaped text encoder, trained from scratch with the backbone."""

    layers: int = 12
    width: int = 768
    ffn: int = 3072
    heads: int = 12
    length: int = 77  # tokens a caption, at most MOST_TOKENS; longer ones are cut
    max_scale: float = 100.0  # upper bound of the learned inverse temperature
    init_scale: float = 1 / 0.07

    def __post_init__(self) -> None:
        positive("text", layers=self.layers, width=self.width, ffn=self.ffn, heads=self.heads)
        if self.width % self.heads:
            raise ValueError(f"text.width={self.width} must be a multiple of text.heads={self.heads}")
        if self.length < 4:
            raise ValueError(
                f"text.length={self.length} must be at least 4: two special tokens and two words"
            )
        if self.length > MOST_TOKENS:
            raise ValueError(
                f"text.length={self.length} must be at most {MOST_TOKENS}, the positions of BERT: longer captions "
                "are cut, attention takes memory by the square of it"
            )
