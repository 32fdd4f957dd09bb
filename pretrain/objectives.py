"""Which input, which targets, which score: THE table of objectives, one row a method (no torch)."""

from __future__ import annotations

from pretrain.objective import EVERY_IMAGE, Input, Objective, Target, View

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
