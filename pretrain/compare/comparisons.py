"""Which rows are compared with each other, as which table of which paper?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pretrain.config import Run
from pretrain.objectives import HVP, OBJECTIVES, SINGLE


def unchanged(run: Run) -> Run:
    """The recipe as it is."""
    return run


@dataclass(frozen=True)
class Variant:
    """One method of a comparison."""

    name: str  # as the table calls it, and its folders
    row: str  # of objectives.OBJECTIVES
    guide: str = ""  # its frozen encoder, as --guide names it; "" where the row needs none
    published: dict[str, float] = field(default_factory=dict)  # what the paper measured, by its own name
    change: Callable[[Run], Run] = unchanged  # what else differs from the other variants, at the end

    def __post_init__(self) -> None:
        if self.row not in OBJECTIVES:
            raise ValueError(f"row={self.row!r} is unknown; choose from {list(OBJECTIVES)}")
        if OBJECTIVES[self.row].needs_guide != bool(self.guide):
            raise ValueError(
                f"guide={self.guide!r} of variant {self.name!r}: row {self.row!r} "
                f"{'needs' if OBJECTIVES[self.row].needs_guide else 'has no use for'} one"
            )


@dataclass(frozen=True)
class Comparison:
    source: str  # paper and table; "" where it is ours
    about: str
    variants: tuple[Variant, ...]
    epochs: int  # of the paper's data, at full size
    gpu_hours: (
        str  # of one variant and seed at full size: operations at 40 % of an H200's 989 TFLOP/s, not measured
    )

    @property
    def guides(self) -> tuple[str, ...]:
        """Names that --guide must give a folder."""
        return tuple(dict.fromkeys(variant.guide for variant in self.variants if variant.guide))


def _rows(**published: tuple[float, ...]) -> tuple[Variant, ...]:
    """A variant a row; the numbers are fine-tuned ImageNet-1k top-1, then COCO box AP."""
    names = ("imagenet1k_top1", "coco_box_ap")
    return tuple(
        Variant(row, row, published=dict(zip(names, numbers, strict=False)))
        for row, numbers in published.items()
    )


# M3I (arXiv 2211.09807), ViT-B/16, 400 epochs of ImageNet-1k; facts of the tables as published.
_SINGLE_PUBLISHED = {
    "auto_encoder": (77.5, 0.0),
    "dense_distillation": (78.8, 32.4),
    "global_distillation": (77.1, 27.9),
    "mim_pixel": (83.1, 46.8),
    "mim_feature": (83.3, 47.4),
    "mim_global": (83.2, 47.5),
    "novel_view_synthesis": (78.8, 33.0),
    "dense_instance_discrimination": (83.2, 50.1),
    "instance_discrimination": (83.0, 46.4),
    "siamese_pixel": (78.9, 38.1),
    "siamese_feature": (83.7, 49.8),
    "siamese_global": (82.9, 46.2),
    "classification": (81.8, 46.6),
}
_M3I_PUBLISHED = {"m3i_without_mixing": (83.7, 50.3), "m3i": (83.9, 50.8)}
_EVERY_SINGLE = {row: _SINGLE_PUBLISHED.get(row, ()) for row in SINGLE}

COMPARISONS: dict[str, Comparison] = {
    "instances": Comparison(
        "M3I, table 3",
        "the 14 instances of one input and one target",
        _rows(**_EVERY_SINGLE),
        400,
        "40 to 70",
    ),
    "m3i": Comparison(
        "M3I, table 4",
        "several targets, and two images in one input",
        _rows(
            classification=_SINGLE_PUBLISHED["classification"],
            mim_feature=_SINGLE_PUBLISHED["mim_feature"],
            siamese_feature=_SINGLE_PUBLISHED["siamese_feature"],
            **_M3I_PUBLISHED,
        ),
        400,
        "40 to 70",
    ),
    "everything": Comparison(
        "M3I, tables 3 and 4",
        "the 14 instances, M3I without mixing, and M3I",
        _rows(**_EVERY_SINGLE, **_M3I_PUBLISHED),
        400,
        "40 to 70",
    ),
    "target_views": Comparison(
        "M3I, table 13",
        "which view of either mixed image is the target, without labels",
        _rows(
            m3i_without_labels_same_same=(77.2, 48.6),
            m3i_without_labels_other_other=(78.5, 49.8),
            m3i_without_labels_other_same=(78.8, 49.2),
            m3i_without_labels=(79.1, 49.5),
        ),
        200,
        "27",
    ),
    "gradient_ratio": Comparison(
        "M3I, table 14",
        "gamma, the share of the labels in the gradient",
        tuple(
            Variant(f"gamma_{gamma}", row, published={"imagenet1k_top1": top1, "coco_box_ap": ap})
            for gamma, row, top1, ap in (
                (0.2, "m3i_gamma_0.2", 83.1, 50.2),
                (0.5, "m3i_gamma_0.5", 83.2, 50.5),
                (1.0, "m3i", 83.3, 50.5),
                (2.0, "m3i_gamma_2.0", 82.8, 48.9),
                (5.0, "m3i_gamma_5.0", 82.5, 47.6),
            )
        ),
        100,
        "14",
    ),
    "target_encoders": Comparison(
        "",
        "who makes the features that masked images predict: momentum teacher, frozen encoder, its tokenizer",
        (
            Variant("momentum", "mim_feature"),
            Variant("frozen", "mim_feature_frozen", "frozen"),
            Variant("tokenizer", "mim_feature_tokenizer", "tokenizer"),
        ),
        400,
        "70",
    ),
    "guides": Comparison(
        "MVP, table 5",
        "which frozen encoder guides: image-text or self-supervised",
        (
            Variant("clip", "mvp", "clip", {"imagenet1k_top1": 84.4, "ade20k_miou": 52.4}),
            Variant("dino", "mvp", "dino", {"imagenet1k_top1": 83.6, "ade20k_miou": 47.0}),
        ),
        300,
        "40",
    ),
    "hvp_losses": Comparison(
        "HVP-MTL, ablation",
        "the losses of HVP-MTL, one added at a time",
        tuple(Variant(row, row) for row in HVP),
        30,
        "600 to 1,000",
    ),
}


def choose(name: str, rows: tuple[str, ...] = ()) -> Comparison:
    """A comparison, of all its variants or of those named; ValueError lists the choices."""
    if name not in COMPARISONS:
        raise ValueError(f"comparison {name!r} is unknown; choose from {list(COMPARISONS)}")
    comparison = COMPARISONS[name]
    by_name = {variant.name: variant for variant in comparison.variants}
    if unknown := [row for row in rows if row not in by_name]:
        raise ValueError(f"--only {unknown} are no variants of {name!r}; choose from {list(by_name)}")
    if len(set(rows)) != len(rows):
        raise ValueError(f"--only {list(rows)} names one twice: name each once")
    variants = tuple(by_name[row] for row in rows) or comparison.variants
    return replace(comparison, variants=variants)
