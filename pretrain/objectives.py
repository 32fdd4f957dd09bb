"""Which input, which targets, which score: THE table of objectives, one row a method (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["dense", "category", "text"]
Score = Literal["gaussian", "boltzmann"]
Keep = Literal["stop_gradient", "negatives"]
Group = Literal["image", "label"]

EVERY_IMAGE = -1

SCORES_OF_KIND: dict[Kind, tuple[Score, ...]] = {
    "dense": ("gaussian",),
    "category": ("boltzmann",),
    "text": ("boltzmann",),
}


@dataclass(frozen=True)
class Input:
    mixed: int = 1  # images mixed into one input, 1 or 2; the hidden patches of one show the other

    def __post_init__(self) -> None:
        if self.mixed not in (1, 2):
            raise ValueError(f"input.mixed={self.mixed} must be 1 (plain view) or 2 (a pair in one input)")


@dataclass(frozen=True)
class Target:
    """One target y of the input x: what is encoded, how the prediction of it is scored."""

    kind: Kind
    score: Score
    view: Literal["same", "other"] = "same"  # the augmented view that is encoded: the input's own or another
    encoder: Literal["ema", "learned"] = "learned"  # who makes z_y; gradients reach only a learned encoder
    keep: Keep = "negatives"  # what keeps z_y from collapsing
    image: int = EVERY_IMAGE  # which of the mixed images, 0 or 1; EVERY_IMAGE for all
    scored: Literal["hidden", "all"] = "all"  # dense targets: patches whose prediction is scored
    weight: float = 1.0  # factor of this target's nats in the sum, > 0

    def __post_init__(self) -> None:
        allowed = SCORES_OF_KIND[self.kind]
        if self.score not in allowed:
            raise ValueError(f"score={self.score!r} does not fit kind={self.kind!r}; choose from {allowed}")
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} must be positive; leave the target out to switch it off")
        if self.kind == "dense" and (self.encoder, self.keep) != ("ema", "stop_gradient"):
            raise ValueError(
                f"a dense target with encoder={self.encoder!r}, keep={self.keep!r} would collapse; "
                "use encoder='ema', keep='stop_gradient'"
            )
        if self.kind != "dense" and (self.encoder, self.keep) != ("learned", "negatives"):
            raise ValueError(
                f"a {self.kind} target needs encoder='learned', keep='negatives'; "
                f"got {self.encoder!r}, {self.keep!r}"
            )

    @property
    def group(self) -> Group:
        """Side of the loss balance: `image` = self-supervised, `label` = category or text."""
        return "image" if self.kind == "dense" else "label"


@dataclass(frozen=True)
class Objective:
    """A method: one input, and every target that its encoding has to predict."""

    input: Input
    targets: dict[str, Target]

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("objective.targets is empty; an objective predicts at least one target")
        for name, target in self.targets.items():
            if target.image >= self.input.mixed:
                raise ValueError(
                    f"target {name!r} asks for image {target.image} of an input that mixes "
                    f"{self.input.mixed}; images count from 0"
                )
            if target.scored == "hidden" and self.input.mixed == 1:
                raise ValueError(f"target {name!r} scores hidden patches, but input.mixed=1 hides none")

    def slots(self, target: Target) -> tuple[int, ...]:
        """Which of the mixed images the target is about."""
        return tuple(range(self.input.mixed)) if target.image == EVERY_IMAGE else (target.image,)

    def needs_other_view(self) -> tuple[bool, ...]:
        """For each of the mixed images: does any target encode its second view?"""
        return tuple(
            any(t.view == "other" and slot in self.slots(t) for t in self.targets.values())
            for slot in range(self.input.mixed)
        )


OBJECTIVES: dict[str, Objective] = {
    # Two images in one input, four targets: M3I paper, section 3.3 and figure 2. The visible part of the
    # mask is image 0 (same view), the masked part image 1 (other view); the roles are not permutable.
    "m3i": Objective(
        Input(mixed=2),
        {
            "image_same": Target(
                "dense", "gaussian", "same", "ema", "stop_gradient", image=0, scored="hidden"
            ),
            "image_other": Target("dense", "gaussian", "other", "ema", "stop_gradient", image=1),
            "category": Target("category", "boltzmann"),
            "text": Target("text", "boltzmann"),
        },
    ),
}
