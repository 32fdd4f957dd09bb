"""Which rows can a result have, and how are they called? Without torch."""

from __future__ import annotations

SHARES = (1, 10)  # per cent of the labels, of rows of few labels
MOST_IMAGES = (
    5000  # that compete in retrieval, with all their captions, unless told otherwise: COCO's test of 5,000
)
MOST_GALLERIES = 5  # of so many images each

ALL = "all"  # stands for every probe
PROBES = {  # row -> title, of what reads features that are kept from one pass over the images
    "knn": "kNN, mean token",
    "knn_embedding": "kNN, pooled embedding",
    "linear": "linear probe, mean token",
    "linear_embedding": "linear probe, pooled embedding",
    "linear_lars": "linear, LARS on kept features",
    "linear_sweep": "linear, best of a sweep",
    "attentive": "attentive probe",
    "few_shot_1_knn": "1 % of the labels, kNN",
    "few_shot_1_linear": "1 % of the labels, linear",
    "few_shot_10_knn": "10 % of the labels, kNN",
    "few_shot_10_linear": "10 % of the labels, linear",
    "dense": "dense probe, mIoU",
    "classifier": "own category head",
    "zero_shot": "zero-shot by class names",
    "retrieval_image": "image to caption, R@1",
    "retrieval_text": "caption to image, R@1",
}
FEW_LABELS = tuple(name for name in PROBES if name.startswith("few_shot_"))
SLOW = ("linear_lars", "linear_sweep", "attentive", *FEW_LABELS)  # measured where they are named
DEFAULT = tuple(name for name in PROBES if name not in SLOW)


def tuned_row(share: int) -> str:
    """Name of the row whose encoder is fine-tuned on `share` per cent of the labels."""
    return f"few_shot_{share}_fine_tune"


# Row of the result -> how it is shown. What follows the probes runs the images, many times.
TITLES = PROBES | {
    "linear_paper": "linear, paper's recipe",
    "attentive_crops": "attentive probe, fresh crops",
}
TITLES |= {"fine_tune": "fine-tuned"}
TITLES |= {tuned_row(share): f"{share} % of the labels, fine-tuned" for share in SHARES}
