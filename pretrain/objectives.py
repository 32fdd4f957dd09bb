"""Which input, which targets, which score: THE table of objectives, one row a method (no torch)."""

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


PLAIN, MASKED, MIXED = Input(), Input(is_masked=True), Input(mixed=2)
BOTH, BOTH_MASKED = Input(views=2), Input(is_masked=True, views=2)
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


# (e) with the other two target encoders of table 1, and what such a tokenizer learns from: features distilled from
# a guide without a mask (FD, arXiv 2205.14141; BEiT v2, arXiv 2208.06366).
GUIDES: dict[str, Objective] = {
    "mim_feature_frozen": _single(
        MASKED, Target("dense", "gaussian", "same", "frozen", "stop_gradient", scored="hidden")
    ),
    "mim_feature_tokenizer": _single(
        MASKED, Target("dense", "boltzmann", "same", "tokenizer", "stop_gradient", scored="hidden")
    ),
    "dense_distillation_frozen": _single(
        PLAIN, Target("dense", "gaussian", "same", "frozen", "stop_gradient")
    ),
}


def _taught(view: View, image: int = EVERY_IMAGE) -> Target:
    """The teacher's tokens of a view; of the input's own view those patches that it hides."""
    scored = "hidden" if view == "same" else "all"
    return Target("dense", "gaussian", view, "ema", "stop_gradient", image, scored=scored)


def _two_images(first: View, second: View, gamma: float = 1.0, **labels: Target) -> Objective:
    """M3I with a choice of the view that is predicted for either image of a mixed input."""
    names = (f"image_{first}", f"image_{second}" + "_second" * (first == second))
    targets = dict(zip(names, (_taught(first, 0), _taught(second, 1)), strict=True))
    return Objective(MIXED, targets | labels, gamma)


# Two images in one input, four targets: M3I paper, section 3.3 and figure 2. The visible part of the mask is
# image 0 (same view), the masked part image 1 (other view); the roles are not permutable. Its ablations: the
# views of the two targets (the paper's are without labels), one masked image an input in place of two, and the
# share of the labels in the gradient.
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
M3I |= {
    f"m3i_gamma_{gamma}": _two_images("same", "other", gamma, category=CATEGORY, text=TEXT)
    for gamma in (0.2, 0.5, 2.0, 5.0)
}

# MVP (ECCV 2022): a masked view predicts what a frozen image-text encoder says of the class and of every patch, by
# one linear layer.
MVP: dict[str, Objective] = {
    "mvp": _single(
        MASKED, Target("dense", "cosine", "same", "frozen", "stop_gradient", decoder="linear", summary=True)
    ),
}

# HVP-MTL (arXiv 2310.07510): four losses with fixed weights, section 3, in the order in which its ablation adds
# them. Both views are masked and encoded, so that every loss reads the one forward; without pixels, none is masked.
_HVP = {
    "tags": Target("tags", "bernoulli", "same", "raw", "none", weight=0.001),
    # 0.02 of the sum over both directions, of which `nats` are the mean
    "clusters": Target("clusters", "boltzmann", "other", "learned", "sinkhorn", weight=0.04),
    "pixels": Target(
        "pixels", "laplace", "same", "raw", "none", scored="hidden", decoder="linear", is_standardised=False
    ),
    "tags_momentum": Target("tags", "boltzmann", "same", "ema", "stop_gradient", weight=10.0),
}


def _first_losses(input: Input, num: int) -> Objective:
    return Objective(input, dict(list(_HVP.items())[:num]), gamma=None)


HVP: dict[str, Objective] = {
    "hvp_tags": _first_losses(BOTH, 1),
    "hvp_tags_clusters": _first_losses(BOTH, 2),
    "hvp_tags_clusters_pixels": _first_losses(BOTH_MASKED, 3),
    "hvp_mtl": _first_losses(BOTH_MASKED, 4),
}

OBJECTIVES: dict[str, Objective] = SINGLE | GUIDES | INSTANCE | M3I | MVP | HVP
