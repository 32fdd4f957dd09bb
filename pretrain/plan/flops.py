"""How many floating-point operations are the mathematics of one optimizer step?

Model FLOPs: two for every multiplication of matrix products and convolutions, attention included; what a backward
pass computes again is not counted, so that the share of a machine's peak (MFU) falls when a run recomputes. A layer
that learns costs its forward pass three times, since the backward pass is one product for the input and one for the
weights; the layer that reads the pixels has no gradient of its input. The teacher costs its forward pass alone.
Left out: norms, activations and sums (under 1 %), the sampling of DCNv3 (45 multiplications a channel and position,
0.4 % of InternImage-H), and a frozen guide, whose layers the recipe does not know. What is left agrees with torch's
counter within 1 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain.config import Backbone, Run
from pretrain.data.mask import num_hidden
from pretrain.facts import DataFacts
from pretrain.models.backbone import BACKBONES
from pretrain.models.internimage_block import DCN_KERNEL
from pretrain.models.internimage_config import STEM_STRIDE, InternImageConfig
from pretrain.models.timm_encoders import SwinSize, ViTSize
from pretrain.objective import Target
from pretrain.served import active_targets

LABEL_EMBEDDED, IMAGE_EMBEDDED = ("category", "text"), ("global", "clusters")  # kinds that read an embedding
BACKWARD = 2  # passes: products for the input's gradient and for the weights'


@dataclass(frozen=True)
class Work:
    """Multiplications of one forward pass, and those of them whose input has no gradient."""

    forward: float
    first: float = 0.0

    @property
    def step(self) -> float:
        """Floating-point operations of a forward and a backward pass."""
        return 2 * ((1 + BACKWARD) * self.forward - self.first)


def step_flops(run: Run, facts: DataFacts) -> float:
    """Model FLOPs of one optimizer step over the global batch: `parts` summed."""
    return sum(parts(run, facts).values())


def parts(run: Run, facts: DataFacts) -> dict[str, float]:
    """Model FLOPs of one optimizer step over the global batch by part of the model, those that are 0 left out."""
    targets = active_targets(run, facts)
    images = run.batch * run.objective.input.views  # where both views are inputs, every image is two
    encoder = encoder_work(run.backbone, run.views.size)
    if run.objective.input.is_masked:  # what hidden patches show is learned
        encoder = Work(encoder.forward)
    found = {
        "encoder": images / run.objective.input.mixed * encoder.step,
        "teacher": 2 * _teacher(run, facts, targets, images, encoder.forward),
        "decoder": sum(images * decoder_work(run, facts, target).step for target in targets.values()),
        "heads": images * Work(_heads(run, facts, targets)).step,
        "text": images * Work(text_work(run)).step if kinds_of(targets) & {"text"} else 0.0,
        "losses": 2 * sum(_loss(run, target, images) for target in targets.values()),
    }
    return {name: operations for name, operations in found.items() if operations}


def kinds_of(targets: dict[str, Target]) -> set[str]:
    return {target.kind for target in targets.values()}


def grid_of(run: Run) -> int:
    """Tokens along one side of a view."""
    return run.views.size // STRIDES[run.backbone.family](size_of(run.backbone))


def width_of(backbone: Backbone) -> int:
    """Numbers of a token."""
    return getattr(size_of(backbone), "width", backbone.token_width)


def size_of(backbone: Backbone) -> Any:
    """The row of its family's table that a recipe names."""
    return BACKBONES[backbone.family].sizes[backbone.size]


def num_owned(run: Run, target: Target) -> int:
    """Tokens that show each image of a target."""
    tokens = grid_of(run) ** 2
    if not run.objective.input.hides:
        return tokens
    hidden = num_hidden(run.grid, run.mask.ratio) * (grid_of(run) // run.grid) ** 2
    return hidden if target.image == 1 else tokens - hidden


def share_of(run: Run, target: Target) -> float:
    """Part of the images that a target is about."""
    return len(run.objective.slots(target)) / run.objective.input.mixed


def output_width(run: Run, facts: DataFacts, target: Target) -> int:
    """Numbers that are predicted of each patch."""
    widths = {
        "pixels": 3 * (run.views.size // grid_of(run)) ** 2,
        "dense": width_of(run.backbone),
        "guide": facts.guide_width,
        "codes": facts.guide_codes,
    }
    return widths[target.output]


def encoder_work(backbone: Backbone, pixels: int) -> Work:
    """Of one image of pixels x pixels."""
    return ENCODERS[backbone.family](size_of(backbone), backbone, pixels)


def transformer_work(tokens: float, seen: float, width: int, ffn: int) -> float:
    """Multiplications of one block: queries, keys, values and output, two layers of the FFN, and attention of every
    token to `seen` ones: tokens (4 width^2 + 2 width ffn + 2 seen width)."""
    return tokens * (4 * width**2 + 2 * width * ffn + 2 * seen * width)


def _vit(size: ViTSize, backbone: Backbone, pixels: int) -> Work:
    patches = (pixels // size.patch) ** 2
    first = patches * size.width * 3 * size.patch**2
    tokens = patches + 1  # the class token
    blocks = size.depth * transformer_work(tokens, tokens, size.width, 4 * size.width)
    return Work(first + blocks, first)


def _swin(size: SwinSize, backbone: Backbone, pixels: int) -> Work:
    grid = pixels // size.patch
    first = total = grid**2 * size.embed * 3 * size.patch**2
    for stage, depth in enumerate(size.depths):
        width = size.embed * 2**stage
        if stage:
            grid //= 2
            total += grid**2 * (2 * width) * width  # four tokens of half the width become one
        window = min(size.window, grid)
        padded = (-(-grid // window) * window) ** 2
        attention = padded * (4 * width**2 + 2 * window**2 * width)
        total += depth * (attention + grid**2 * 8 * width**2)
    return Work(total, first)


def _internimage(size: InternImageConfig, backbone: Backbone, pixels: int) -> Work:
    """A position of width c with g groups and p points: 2 c^2 for the projections around the sampling, 3 g p c for
    offsets and masks, g c for the centre scale, k^2 c for the depth-wise convolution, 2 r c^2 for the MLP."""
    half = size.channels // 2
    first = (pixels // 2) ** 2 * half * 3 * 9
    total = first + (pixels // STEM_STRIDE) ** 2 * size.channels * half * 9
    points = DCN_KERNEL**2 - size.remove_center
    for width, groups, stride, depth in zip(size.widths, size.groups, size.strides, size.depths, strict=True):
        logits = (3 * points + size.center_feature_scale) * groups
        a_position = 2 * width**2 + logits * width + size.dw_kernel_size**2 * width
        a_position += 2 * width * int(width * size.mlp_ratio)
        total += (pixels // stride) ** 2 * depth * a_position
        if stride < size.strides[-1]:
            total += (pixels // (2 * stride)) ** 2 * 9 * width * 2 * width
    fine, coarse = ((pixels // stride) ** 2 for stride in size.strides[-2:])
    total += (
        fine * size.widths[-2] * backbone.token_width + coarse * size.widths[-1] * 4 * backbone.token_width
    )
    return Work(total, first)


ENCODERS: dict[str, Callable[[Any, Backbone, int], Work]] = {
    "internimage": _internimage,
    "swin": _swin,
    "vit": _vit,
}
STRIDES: dict[str, Callable[[Any], int]] = {  # pixels along one side of a token
    "internimage": lambda size: size.strides[-2],
    "swin": lambda size: size.stride,
    "vit": lambda size: size.patch,
}


def decoder_work(run: Run, facts: DataFacts, target: Target) -> Work:
    """Multiplications for an image of the batch, of which a target may be about every second only."""
    if target.kind not in ("pixels", "dense"):
        return Work(0.0)
    width, tokens, share = width_of(run.backbone), grid_of(run) ** 2, share_of(run, target)
    out = output_width(run, facts, target)
    if not target.is_decoded:
        return Work(share * (tokens + target.summary) * width * out)
    decoder, owned = run.decoder, num_owned(run, target)
    places = tokens * 2 * decoder.width**2  # the geometry, which needs no gradient, embedded
    each = transformer_work(owned + tokens, owned + tokens, decoder.width, decoder.ffn)
    embed, predict = owned * width * decoder.width, tokens * decoder.width * out
    return Work(share * (embed + places + decoder.layers * each + predict), share * places)


def text_work(run: Run) -> float:
    """Multiplications of a caption's encoding; every image has one, empty or not."""
    text = run.text
    blocks = text.layers * transformer_work(text.length, text.length, text.width, text.ffn)
    return blocks + text.width * run.pool.width


def _pool(run: Run) -> float:
    width, tokens, pool = width_of(run.backbone), grid_of(run) ** 2, run.pool
    if pool.kind == "mean":
        return width * pool.width
    return (2 * tokens + 1) * width**2 + 2 * tokens * width + width * pool.width


def _projector(width: int, hidden: int, out: int) -> float:
    return width * hidden + hidden * out


def _tags(run: Run, num_tags: int) -> float:
    """Every tag reads the image in each layer; the first layer's queries are those of all images."""
    tags, tokens = run.tags, grid_of(run) ** 2
    read = tokens * width_of(run.backbone) * tags.width + tags.layers * tokens * 2 * tags.width**2
    a_query = tags.layers * (tags.width**2 + 2 * tokens * tags.width + 2 * tags.width * tags.ffn)
    a_query += (tags.layers - 1) * tags.width**2
    return read + num_tags * (a_query + tags.width)


def _heads(run: Run, facts: DataFacts, targets: dict[str, Target]) -> float:
    """Multiplications for an image: an embedding a side of the loss balance, and what reads it."""
    kinds, embedding = kinds_of(targets), run.pool.width
    projection, clusters = run.projection, run.clusters
    total = _pool(run) * (bool(kinds & set(LABEL_EMBEDDED)) + bool(kinds & set(IMAGE_EMBEDDED)))
    if "global" in kinds:
        total += _projector(embedding, projection.hidden, projection.width)
        total += _projector(projection.width, projection.hidden, projection.width)
    if "clusters" in kinds:
        total += _projector(embedding, clusters.hidden, clusters.width) + clusters.width * clusters.prototypes
    if "tags" in kinds:
        total += _tags(run, len(facts.tags))
    total += embedding * len(facts.categories) * ("category" in kinds)
    return total + embedding**2 * ("text" in kinds)


def _teacher(run: Run, facts: DataFacts, targets: dict[str, Target], images: float, encoder: float) -> float:
    """Multiplications of the batch: every view that targets ask for is encoded once, for all kinds of target."""
    taught = [target for target in targets.values() if target.encoder == "ema"]
    kinds = {target.kind for target in taught}
    each = encoder
    if "global" in kinds:
        each += _pool(run) + _projector(run.pool.width, run.projection.hidden, run.projection.width)
    if "tags" in kinds:
        each += _tags(run, len(facts.tags))
    views = {(target.view, run.objective.slots(target)): share_of(run, target) for target in taught}
    return images * sum(views.values()) * each


def _loss(run: Run, target: Target, images: float) -> float:
    """Multiplications of what meets all of the global batch, forward and backward; gradients reach one side."""
    rows, width = images * share_of(run, target), 0
    if target.kind == "text":
        width = 2 * run.pool.width  # both directions
    elif target.kind == "global" and target.score == "boltzmann":
        width = run.projection.width
    elif target.kind == "dense" and target.score == "boltzmann" and target.encoder == "ema":
        rows, width = rows * min(run.projection.dense_samples, grid_of(run) ** 2), width_of(run.backbone)
    return 2 * rows**2 * width
