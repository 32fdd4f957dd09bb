"""What is a run? Frozen, typed data that checks itself; mathematics, nothing of the machine, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pretrain import written
from pretrain.model_config import (
    Backbone,
    Clusters,
    Decoder,
    Pool,
    Projection,
    Tags,
    Text,
    fraction,
    positive,
    require_finite,
)
from pretrain.objective import Objective
from pretrain.training_config import Balance, Guard, Optim, Teacher

SIGMA_SIDE = 224  # pixels: Views.blur_sigma is given for views of this side
LEAST_STD = 1 / 256  # of one level of a pixel: what is smaller is no deviation of RGB in [0, 1]
MOST_JITTER = 10.0  # factors go to 1 + strength: beyond, nearly every view is black or white
MOST_RATIO = 100.0  # crops beyond are a row or column of pixels


@dataclass(frozen=True)
class Views:
    """Augmented views: whole-image flip, RandomResizedCrop, then colour (SiameseIM, appendix)."""

    size: int = 192  # pixels, side of a view
    scale: tuple[float, float] = (0.2, 1.0)  # crop area / image area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # crop width / height, in [1 / MOST_RATIO, MOST_RATIO]
    flip: float = 0.5  # probability
    # brightness contrast saturation, in [0, MOST_JITTER]; hue, in [0, 0.5] of a turn
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grayscale: float = 0.2  # probability
    blur: tuple[float, float] = (1.0, 0.1)  # probability in view 1, in view 2
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels at SIGMA_SIDE, scaled with the size
    solarize: tuple[float, float] = (0.0, 0.2)  # probability in view 1, in view 2
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # of the same, in [LEAST_STD, 1]
    # What the training device makes of the views: nothing, the colours, or all from the JPEG files on. The draws are
    # the same and the pixels differ by rounding, so that a run may not be resumed with another choice. With "all"
    # files that are damaged inside pass, where the strict decoder of the workers replaces them.
    on_device: Literal["none", "colours", "all"] = "none"

    def __post_init__(self) -> None:
        positive("views", size=self.size)
        fraction(
            "views",
            flip=self.flip,
            jitter_probability=self.jitter_probability,
            grayscale=self.grayscale,
            **{f"{name}[{i}]": p for name in ("blur", "solarize") for i, p in enumerate(getattr(self, name))},
        )
        positive("views", **{f"std[{i}]": value for i, value in enumerate(self.std)})
        for name, least in (("mean", 0.0), ("std", LEAST_STD)):
            if not all(least <= value <= 1 for value in getattr(self, name)):
                raise ValueError(
                    f"views.{name}={getattr(self, name)} must lie in [{least:.4g}, 1], as pixels in [0, 1] have it: "
                    "divide numbers for levels up to 255 by 255"
                )
        most = (MOST_JITTER, MOST_JITTER, MOST_JITTER, 0.5)
        if not all(0 <= value <= bound for value, bound in zip(self.jitter, most, strict=True)):
            raise ValueError(
                f"views.jitter={self.jitter} must not be negative, nor above {MOST_JITTER:g}, its hue at most 0.5 of "
                "a turn: 0 leaves one as it is"
            )
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1] <= SIGMA_SIDE:
            raise ValueError(
                f"views.blur_sigma={self.blur_sigma} must be an increasing pair of positive pixels, at most "
                f"{SIGMA_SIDE}: views.blur=0 0 blurs none"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"views.scale={self.scale} must be an increasing pair in (0, 1]")
        if not 1 / MOST_RATIO <= self.ratio[0] <= self.ratio[1] <= MOST_RATIO:
            raise ValueError(
                f"views.ratio={self.ratio} must be an increasing pair in [{1 / MOST_RATIO:g}, {MOST_RATIO:g}]: 1 1 "
                "crops squares"
            )


@dataclass(frozen=True)
class Mask:
    """Mask of the input: True patches show the second image, or nothing."""

    ratio: float = 0.5  # fraction of patches that are hidden of the (first) image, in (0, 1)
    patch: int = 16  # pixels, side of one square
    shape: Literal["blocks", "scattered"] = "blocks"  # as in BEiT, or every patch by itself, as in SimMIM
    min_block: int = 16  # patches, smallest block that is drawn
    aspect: float = 0.3  # block height / width is log-uniform in [aspect, 1 / aspect]

    def __post_init__(self) -> None:
        positive("mask", patch=self.patch, min_block=self.min_block)
        if not 0 < self.ratio < 1:
            raise ValueError(f"mask.ratio={self.ratio} must lie in (0, 1)")
        if not 0 < self.aspect <= 1:
            raise ValueError(f"mask.aspect={self.aspect} must lie in (0, 1]")
        for name in ("min_block", "aspect") if self.shape == "scattered" else ():
            if getattr(self, name) != getattr(Mask, name):
                raise ValueError(
                    f"mask.{name}={getattr(self, name)} would be ignored: it is about blocks, and "
                    "mask.shape='scattered' draws every patch by itself; leave it out"
                )


@dataclass(frozen=True)
class Source:
    """One data set of the mixture and the supervision that is taken from it."""

    supervision: Literal["category", "text", "tags", "none"]
    weight: float = 1.0  # share of the samples, relative to the other sources
    # Captions made of the sample's category, one of these at random with its name in place of {}; () = its own.
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        positive("data", weight=self.weight)
        if self.prompts and self.supervision != "text":
            raise ValueError(
                f"prompts={list(self.prompts)} of a source with supervision={self.supervision!r} would be ignored: "
                "ask for 'text', or leave them out"
            )
        if without := [prompt for prompt in self.prompts if "{}" not in prompt]:
            raise ValueError(
                f"prompts {without} must hold {{}} in place of the category, as in 'a photo of {{}}.'"
            )


@dataclass(frozen=True)
class Mixing:
    """How the samples of all sources stand in the run's order."""

    by: Literal["weight", "size"] = (
        "weight"  # shares: data.NAME.weight, or that for each of a source's samples
    )
    temperature: float = (
        1.0  # shares to the power of 1 / temperature (arXiv 1907.05019): above 1 evens them out
    )
    pairs: Literal["any", "same", "other"] = "any"  # sources of an input's images; "same": shares to one pair
    window: int = 32  # shards whose samples are shuffled together: locality of reading against mixing

    def __post_init__(self) -> None:
        positive("mixing", temperature=self.temperature, window=self.window)
        if not isinstance(self.window, int):
            raise ValueError(
                f"mixing.window={self.window!r} counts shards and must be a whole number: set "
                f"{max(round(self.window), 1)}"
            )


@dataclass(frozen=True)
class Run:
    """Everything that decides the numbers of a pre-training run."""

    name: str  # recipe that it came from
    objective: Objective
    data: dict[str, Source]  # name on the command line -> what is taken from it
    batch: int  # images in the global batch of one optimizer step
    steps: int  # optimizer steps
    mixing: Mixing = field(default_factory=Mixing)
    backbone: Backbone = field(default_factory=Backbone)
    decoder: Decoder = field(default_factory=Decoder)
    pool: Pool = field(default_factory=Pool)
    projection: Projection = field(default_factory=Projection)
    tags: Tags = field(default_factory=Tags)
    clusters: Clusters = field(default_factory=Clusters)
    text: Text = field(default_factory=Text)
    views: Views = field(default_factory=Views)
    mask: Mask = field(default_factory=Mask)
    optim: Optim = field(default_factory=Optim)
    teacher: Teacher = field(default_factory=Teacher)
    balance: Balance = field(default_factory=Balance)
    guard: Guard = field(default_factory=Guard)
    label_smoothing: float = 0.1
    max_bad: float = 0.01  # fraction of samples that may be unreadable before the run stops
    save_every: int = 1000  # steps between checkpoints
    keep_last: int = 2  # newest checkpoints that are kept, besides that of step 0
    keep_every: int = 0  # steps: multiples of it are kept for good; 0 = none
    log_every: int = 10  # steps between log lines
    seed: int = 0  # in [0, 2^32)

    def __post_init__(self) -> None:
        require_finite(self)
        positive(
            "run",
            batch=self.batch,
            steps=self.steps,
            save_every=self.save_every,
            keep_last=self.keep_last,
            log_every=self.log_every,
        )
        if self.keep_every < 0 or self.keep_every % self.save_every:
            raise ValueError(
                f"keep_every={self.keep_every} must be a multiple of save_every={self.save_every}, or 0 to keep none "
                f"for good: set {-(-abs(self.keep_every) // self.save_every) * self.save_every}"
            )
        fraction("run", label_smoothing=self.label_smoothing, max_bad=self.max_bad)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in [0, {2**32 - 1}]: set another number")
        if not self.data:
            raise ValueError("run.data is empty; name at least one source")
        if self.batch % self.objective.input.mixed:
            raise ValueError(
                f"batch={self.batch} counts images and must be a multiple of "
                f"objective.input.mixed={self.objective.input.mixed}: set {self.batch + 1}"
            )
        if self.mixing.pairs != "any" and self.objective.input.mixed == 1:
            raise ValueError(
                f"mixing.pairs={self.mixing.pairs!r} would be ignored: all its inputs show one image: "
                "leave it out"
            )
        self._check_mask()
        if self.optim.warmup > self.steps:
            raise ValueError(
                f"optim.warmup={self.optim.warmup} is longer than steps={self.steps}: lower optim.warmup"
            )

    def _check_mask(self) -> None:
        """ValueError unless the mask divides the view into whole squares, and into the shares that targets need."""
        patches = self.grid**2
        num_second = self.mask.ratio * patches
        if self.objective.input.hides and patches < 4:
            raise ValueError(
                f"mask.patch={self.mask.patch} leaves {self.grid} x {self.grid} squares in {self.views.size} px: "
                f"a mask needs 2 x 2: set views.size={2 * self.mask.patch} or more, or a smaller mask.patch"
            )
        if self.objective.input.hides and abs(num_second - round(num_second)) > 1e-3:
            nearest = min(max(round(num_second), 1), patches - 1) / patches
            raise ValueError(
                f"mask.ratio={self.mask.ratio} of {self.grid} x {self.grid} patches is {num_second:g}, which must be "
                f"a whole number: set {nearest:.6f}"
            )
        if self.views.size % self.mask.patch:
            raise ValueError(
                f"views.size={self.views.size} must be a multiple of mask.patch={self.mask.patch}: set "
                f"{max(round(self.views.size / self.mask.patch), 1) * self.mask.patch}"
            )
        for name, target in self.objective.targets.items():
            if (
                target.is_decoded
                and len(self.objective.slots(target)) > 1
                and 2 * round(num_second) != patches
            ):
                raise ValueError(
                    f"mask.ratio={self.mask.ratio} gives image 0 {patches - round(num_second)} of {patches} patches, "
                    f"and target {name!r} decodes both images from what each owns, which must be equally much: "
                    "set mask.ratio=0.5, or a target each for image 0 and 1"
                )

    def images_per_rank(self, world: int, micro_batches: int = 1) -> int:
        """Images of the batch that each of `world` ranks takes; ValueError when they do not divide evenly, or not
        into `micro_batches` equal parts.
        """
        mixed = self.objective.input.mixed
        unit = world * mixed
        if self.batch % unit:
            raise ValueError(
                f"batch={self.batch} must be a multiple of {unit} ({world} ranks x {mixed} "
                f"images an input): start another number of ranks or set --batch {-(-self.batch // unit) * unit}"
            )
        inputs = self.batch // unit
        if micro_batches < 1 or inputs % micro_batches:
            fitting = [number for number in range(1, inputs + 1) if inputs % number == 0]
            nearest = min(fitting, key=lambda number: abs(number - micro_batches))
            raise ValueError(
                f"--micro-batches {micro_batches} must divide the {inputs} inputs of a rank (batch={self.batch}, "
                f"{world} ranks, {mixed} images an input): set {nearest}"
            )
        return self.batch // world

    def is_logged(self, step: int) -> bool:
        """Does step `step`, counted from 1, leave a line in the log? The first and the last always do."""
        return step % self.log_every == 0 or step in (1, self.steps)

    @property
    def grid(self) -> int:
        """Squares of the mask along one side of a view."""
        return self.views.size // self.mask.patch

    def to_json(self) -> str:
        """The resolved run as text, from which `from_json` makes an equal one."""
        return written.to_json(self)

    @staticmethod
    def from_json(text: str) -> Run:
        """ValueError that names the field that does not fit, or that this version does not know."""
        return written.from_json(Run, text)
