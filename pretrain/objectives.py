"""Which input, which targets, which score: THE table of objectives, one row a method (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["pixels", "dense", "global", "category", "text"]
Score = Literal["gaussian", "laplace", "cosine", "boltzmann"]
Encoder = Literal["raw", "ema", "learned"]
Keep = Literal["none", "stop_gradient", "negatives", "decorrelation"]
Group = Literal["image", "label"]
View = Literal["same", "other"]

EVERY_IMAGE = -1

SCORES_OF_KIND: dict[Kind, tuple[Score, ...]] = {
    "pixels": ("gaussian", "laplace"),
    "dense": ("gaussian", "laplace", "cosine", "boltzmann"),
    "global": ("gaussian", "cosine", "boltzmann"),
    "category": ("boltzmann",),
    "text": ("boltzmann",),
}
# Who may make a kind's z_y, and what may keep that from collapsing: pixels cannot, and need nothing.
ENCODERS_OF_KIND: dict[Kind, tuple[tuple[Encoder, Keep], ...]] = {
    "pixels": (("raw", "none"),),
    "dense": (("ema", "stop_gradient"), ("ema", "negatives")),
    "global": (("ema", "stop_gradient"), ("ema", "negatives"), ("ema", "decorrelation")),
    "category": (("learned", "negatives"),),
    "text": (("learned", "negatives"),),
}
LABELS = ("category", "text")


@dataclass(frozen=True)
class Input:
    mixed: int = 1  # images mixed into one input, 1 or 2; the hidden patches of one show the other
    is_masked: bool = False  # hidden patches of a plain view show one learned patch; Run.mask says how many

    def __post_init__(self) -> None:
        if self.mixed not in (1, 2):
            raise ValueError(f"input.mixed={self.mixed} must be 1 (plain view) or 2 (a pair in one input)")
        if self.is_masked and self.mixed == 2:
            raise ValueError(
                "input.is_masked=True with input.mixed=2 would hide every patch twice: a mixed input hides each "
                "image under the other; choose one of them"
            )

    @property
    def hides(self) -> bool:
        """Does the input show only some patches of each image?"""
        return self.is_masked or self.mixed == 2


@dataclass(frozen=True)
class Target:
    """One target y of the input x: what is encoded, how the prediction of it is scored."""

    kind: Kind
    score: Score
    view: View = "same"  # the augmented view that is encoded: the input's own or another
    encoder: Encoder = "learned"  # who makes z_y; gradients reach only a learned encoder
    keep: Keep = "negatives"  # what keeps z_y from collapsing
    image: int = EVERY_IMAGE  # which of the mixed images, 0 or 1; EVERY_IMAGE for all
    scored: Literal["hidden", "all"] = "all"  # pixels and dense: patches whose prediction is scored
    weight: float = 1.0  # factor of this target's nats in the sum, > 0

    def __post_init__(self) -> None:
        allowed = SCORES_OF_KIND[self.kind]
        if self.score not in allowed:
            raise ValueError(f"score={self.score!r} does not fit kind={self.kind!r}; choose from {allowed}")
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} must be positive; leave the target out to switch it off")
        pairs = ENCODERS_OF_KIND[self.kind]
        if (self.encoder, self.keep) not in pairs:
            raise ValueError(
                f"a {self.kind} target with encoder={self.encoder!r}, keep={self.keep!r} has no meaning here, or "
                f"would collapse; choose from {pairs}"
            )
        if self.keep == "negatives" and self.score != "boltzmann":
            raise ValueError(
                f"keep='negatives' needs score='boltzmann', whose sum they enter; got {self.score!r}"
            )
        if self.keep == "decorrelation" and self.score != "gaussian":
            raise ValueError(f"keep='decorrelation' needs score='gaussian'; got {self.score!r}")
        if self.scored == "hidden" and (self.view == "other" or self.kind not in ("pixels", "dense")):
            raise ValueError(
                f"scored='hidden' means patches of the input itself, not of kind={self.kind!r}, view={self.view!r}; "
                "use scored='all'"
            )

    @property
    def group(self) -> Group:
        """Side of the loss balance: `image` = self-supervised, `label` = category or text."""
        return "label" if self.kind in LABELS else "image"


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
            if target.scored == "hidden" and not self.input.hides:
                raise ValueError(
                    f"target {name!r} scores hidden patches, but the input hides none: set input.is_masked or "
                    "input.mixed=2"
                )

    def slots(self, target: Target) -> tuple[int, ...]:
        """Which of the mixed images the target is about."""
        return tuple(range(self.input.mixed)) if target.image == EVERY_IMAGE else (target.image,)

    def needs_other_view(self) -> tuple[bool, ...]:
        """For each of the mixed images: does any target encode its second view?"""
        return tuple(
            any(t.view == "other" and slot in self.slots(t) for t in self.targets.values())
            for slot in range(self.input.mixed)
        )


PLAIN, MASKED, MIXED = Input(), Input(is_masked=True), Input(mixed=2)
CATEGORY, TEXT = Target("category", "boltzmann"), Target("text", "boltzmann")


def _single(input: Input, target: Target) -> Objective:
    return Objective(input, {target.kind: target})


# The 14 instances of one input and one target: M3I paper, table 1; its letters in the comments.
SINGLE: dict[str, Objective] = {
    "classification": _single(PLAIN, CATEGORY),
    "contrastive_language_image": _single(PLAIN, TEXT),
    "auto_encoder": _single(PLAIN, Target("pixels", "gaussian", "same", "raw", "none")),  # (a)
    "dense_distillation": _single(PLAIN, Target("dense", "gaussian", "same", "ema", "stop_gradient")),  # (b)
    "global_distillation": _single(
        PLAIN, Target("global", "boltzmann", "same", "ema", "stop_gradient")
    ),  # (c)
    "mim_pixel": _single(MASKED, Target("pixels", "gaussian", "same", "raw", "none", scored="hidden")),  # (d)
    "mim_feature": _single(
        MASKED, Target("dense", "gaussian", "same", "ema", "stop_gradient", scored="hidden")
    ),  # (e)
    "mim_global": _single(MASKED, Target("global", "gaussian", "same", "ema", "stop_gradient")),  # (f)
    "novel_view_synthesis": _single(PLAIN, Target("pixels", "gaussian", "other", "raw", "none")),  # (g)
    "dense_instance_discrimination": _single(
        PLAIN, Target("dense", "boltzmann", "other", "ema", "negatives")
    ),  # (h)
    "instance_discrimination": _single(
        PLAIN, Target("global", "boltzmann", "other", "ema", "negatives")
    ),  # (i)
    "siamese_pixel": _single(MASKED, Target("pixels", "gaussian", "other", "raw", "none")),  # (j)
    "siamese_feature": _single(MASKED, Target("dense", "gaussian", "other", "ema", "stop_gradient")),  # (k)
    "siamese_global": _single(MASKED, Target("global", "boltzmann", "other", "ema", "negatives")),  # (l)
}

# (i) with the other two regularisers of table 1: as in BYOL, and as in Barlow Twins.
INSTANCE: dict[str, Objective] = {
    "instance_stop_gradient": _single(PLAIN, Target("global", "gaussian", "other", "ema", "stop_gradient")),
    "instance_decorrelation": _single(PLAIN, Target("global", "gaussian", "other", "ema", "decorrelation")),
}


def _taught(view: View, image: int = EVERY_IMAGE) -> Target:
    """The teacher's tokens of a view; of the input's own view those patches that it hides."""
    scored = "hidden" if view == "same" else "all"
    return Target("dense", "gaussian", view, "ema", "stop_gradient", image, scored=scored)


def _two_images(first: View, second: View, **labels: Target) -> Objective:
    """M3I with a choice of the view that is predicted for either image of a mixed input."""
    names = (f"image_{first}", f"image_{second}" + "_second" * (first == second))
    return Objective(MIXED, dict(zip(names, (_taught(first, 0), _taught(second, 1)), strict=True)) | labels)


# Two images in one input, four targets: M3I paper, section 3.3 and figure 2. The visible part of the mask is
# image 0 (same view), the masked part image 1 (other view); the roles are not permutable. Its ablations: the
# views of the two targets (the paper's are without labels), and one masked image an input in place of two.
M3I: dict[str, Objective] = {
    "m3i": _two_images("same", "other", category=CATEGORY, text=TEXT),
    "m3i_without_labels": _two_images("same", "other"),
    "m3i_without_labels_same_same": _two_images("same", "same"),
    "m3i_without_labels_other_other": _two_images("other", "other"),
    "m3i_without_labels_other_same": _two_images("other", "same"),
    "m3i_without_mixing": Objective(
        MASKED,
        {
            "image_same": _taught("same"),
            "image_other": _taught("other"),
            "category": CATEGORY,
            "text": TEXT,
        },
    ),
}

OBJECTIVES: dict[str, Objective] = SINGLE | INSTANCE | M3I
