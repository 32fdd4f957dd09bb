"""What is a method? One input, and targets of its encoding; what cannot mean anything is refused (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["pixels", "dense", "global", "category", "text", "tags", "clusters"]
Score = Literal["gaussian", "laplace", "cosine", "boltzmann", "bernoulli"]
# raw: the data itself; ema: momentum teacher; learned: with the student; frozen: a guide, pre-trained by others or
# by us; tokenizer: a guide whose features are looked up in a codebook.
Encoder = Literal["raw", "ema", "learned", "frozen", "tokenizer"]
Keep = Literal["none", "stop_gradient", "negatives", "decorrelation", "sinkhorn"]
Group = Literal["image", "label"]
View = Literal["same", "other"]

EVERY_IMAGE = -1

# kind -> who may make its z_y, and what keeps that from collapsing -> how a prediction of it is scored.
FORMS: dict[Kind, dict[tuple[Encoder, Keep], tuple[Score, ...]]] = {
    "pixels": {("raw", "none"): ("gaussian", "laplace")},
    "dense": {
        ("ema", "stop_gradient"): ("gaussian", "laplace", "cosine", "boltzmann"),
        ("ema", "negatives"): ("boltzmann",),
        ("frozen", "stop_gradient"): ("gaussian", "laplace", "cosine"),
        ("tokenizer", "stop_gradient"): ("boltzmann",),
    },
    "global": {
        ("ema", "stop_gradient"): ("gaussian", "cosine", "boltzmann"),
        ("ema", "negatives"): ("boltzmann",),
        ("ema", "decorrelation"): ("gaussian",),
    },
    "category": {("learned", "negatives"): ("boltzmann",)},
    "text": {("learned", "negatives"): ("boltzmann",)},
    "tags": {("raw", "none"): ("bernoulli",), ("ema", "stop_gradient"): ("boltzmann",)},
    "clusters": {("learned", "sinkhorn"): ("boltzmann",)},
}
# What is said of the image, not of a view, and what is swapped between views, has no choice of one.
VIEWS: dict[tuple[Kind, Encoder], tuple[View, ...]] = {
    ("category", "learned"): ("same",),
    ("text", "learned"): ("same",),
    ("tags", "raw"): ("same",),
    ("clusters", "learned"): ("other",),
}
LABELS = ("category", "text", "tags")
GUIDED = ("frozen", "tokenizer")  # encoders that --guide names
OUTPUTS = {
    "frozen": "guide",
    "tokenizer": "codes",
}  # encoder -> space of its features; else the target's kind


@dataclass(frozen=True)
class Input:
    mixed: int = 1  # images mixed into one input, 1 or 2; the hidden patches of one show the other
    is_masked: bool = False  # hidden patches of a plain view show one learned patch; Run.mask says how many
    views: int = 1  # augmented views of an image that are inputs: 1, or 2 where each is the other's target

    def __post_init__(self) -> None:
        if self.mixed not in (1, 2):
            raise ValueError(f"input.mixed={self.mixed} must be 1 (plain view) or 2 (a pair in one input)")
        if self.is_masked and self.mixed == 2:
            raise ValueError(
                "input.is_masked=True with input.mixed=2 would hide every patch twice: a mixed input hides each "
                "image under the other; choose one of them"
            )
        if self.views not in (1, 2) or (self.views == 2 and self.mixed == 2):
            raise ValueError(
                f"input.views={self.views} must be 1, or 2 for both views of a plain or masked image in turn; a "
                f"mixed input (input.mixed={self.mixed}) shows view 1 of its images"
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
    decoder: Literal["transformer", "linear"] = "transformer"  # pixels and dense: what predicts a patch
    summary: bool = False  # dense, linear: the class token (the mean where there is none) is scored as well
    is_standardised: bool = True  # pixels: within each patch (MAE); False: as the encoder sees them (SimMIM)
    uniformity: float = 0.0  # dense, gaussian: weight of what predictions share with all targets (UniGrad)
    weight: float = 1.0  # factor of this target's nats in the sum, > 0

    def __post_init__(self) -> None:
        forms = FORMS[self.kind]
        allowed = tuple(dict.fromkeys(score for scores in forms.values() for score in scores))
        if self.score not in allowed:
            raise ValueError(f"score={self.score!r} does not fit kind={self.kind!r}; choose from {allowed}")
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} must be positive; leave the target out to switch it off")
        if (self.encoder, self.keep) not in forms:
            raise ValueError(
                f"a {self.kind} target with encoder={self.encoder!r}, keep={self.keep!r} has no meaning here, or "
                f"would collapse; choose from {tuple(forms)}"
            )
        if self.score not in (scores := forms[self.encoder, self.keep]):
            raise ValueError(
                f"score={self.score!r} does not fit encoder={self.encoder!r}, keep={self.keep!r} of a {self.kind} "
                f"target; choose from {scores}"
            )
        if self.view not in VIEWS.get((self.kind, self.encoder), ("same", "other")):
            raise ValueError(
                f"view={self.view!r} of a {self.kind} target would be ignored: clusters are those of the other view, "
                "labels those of the image; leave clusters at view='other', labels at view='same'"
            )
        self._check_patches()

    def _check_patches(self) -> None:
        """ValueError for choices about patches that the target does not have."""
        is_spatial, is_same = self.kind in ("pixels", "dense"), self.view == "same"
        if self.scored == "hidden" and not (is_spatial and is_same):
            raise ValueError(
                f"scored='hidden' means patches of the input itself, not of kind={self.kind!r}, view={self.view!r}; "
                "use scored='all'"
            )
        if self.decoder == "linear" and not (is_spatial and is_same):
            raise ValueError(
                f"decoder='linear' predicts a patch from the token at its place: kind={self.kind!r}, view="
                f"{self.view!r} has none; use 'transformer'"
            )
        if self.decoder == "linear" and self.score == "boltzmann" and self.encoder == "ema":
            raise ValueError("decoder='linear' has no dense matching; use 'transformer'")
        if self.summary and (self.kind != "dense" or self.decoder != "linear" or self.score == "boltzmann"):
            raise ValueError(
                f"summary=True is one more token for a linear decoder: kind={self.kind!r}, decoder="
                f"{self.decoder!r}, score={self.score!r} must be 'dense', 'linear' and no softmax"
            )
        if not self.is_standardised and self.kind != "pixels":
            raise ValueError(f"is_standardised=False is about pixels, not kind={self.kind!r}; leave it out")
        if self.uniformity < 0 or (
            self.uniformity and (self.kind, self.score, self.encoder) != ("dense", "gaussian", "ema")
        ):
            raise ValueError(
                f"uniformity={self.uniformity} must be 0, or positive with kind='dense', score='gaussian', "
                "encoder='ema', whose targets it spreads"
            )

    @property
    def output(self) -> str:
        """Which numbers the prediction of a patch holds: pixels, dense (the teacher's), guide or codes."""
        return OUTPUTS.get(self.encoder, self.kind)

    @property
    def is_decoded(self) -> bool:
        """Is it predicted from the tokens that its image owns, by the transformer?"""
        return self.kind in ("pixels", "dense") and self.decoder == "transformer"

    @property
    def group(self) -> Group:
        """Side of the loss balance: `image` = self-supervised, `label` = category, text or tags."""
        return "label" if self.kind in LABELS else "image"


@dataclass(frozen=True)
class Objective:
    """A method: one input, and every target that its encoding has to predict."""

    input: Input
    targets: dict[str, Target]
    # Gradient of the label losses over that of the image losses, where both reach the encoder; None: no balance.
    gamma: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("objective.targets is empty; an objective predicts at least one target")
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"objective.gamma={self.gamma} must be positive, or None for fixed weights")
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
            if target.kind == "clusters" and self.input.views == 1:
                raise ValueError(
                    f"target {name!r} swaps the clusters of two views: set input.views=2, which encodes both"
                )
            if target.keep == "negatives" and target.kind in ("dense", "global") and self.input.views == 2:
                raise ValueError(
                    f"target {name!r} with input.views=2 would meet both views of an image among its negatives: "
                    "set input.views=1"
                )
        if self.gamma not in (None, 1.0) and len({target.group for target in self.targets.values()}) < 2:
            raise ValueError(
                f"objective.gamma={self.gamma} balances label losses against image losses, targets "
                f"{sorted(self.targets)} are of one side only: leave gamma out"
            )

    @property
    def needs_guide(self) -> bool:
        """Does any target need the frozen encoder that --guide names?"""
        return any(target.encoder in GUIDED for target in self.targets.values())

    def slots(self, target: Target) -> tuple[int, ...]:
        """Which of the mixed images the target is about."""
        return tuple(range(self.input.mixed)) if target.image == EVERY_IMAGE else (target.image,)

    def needs_other_view(self) -> tuple[bool, ...]:
        """For each of the mixed images: does any target encode its second view?"""
        return tuple(
            self.input.views == 2
            or any(t.view == "other" and slot in self.slots(t) for t in self.targets.values())
            for slot in range(self.input.mixed)
        )
