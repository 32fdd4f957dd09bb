"""How much waits for the backward pass? Numbers that autograd keeps of one input, by part of the model.

Of a Transformer block, for every token: the inputs of both norms and of both branches (4 widths), queries, keys and
values (3), what attention gives (1), and the hidden layer before and after its activation (2 ffn). Of a block of
InternImage: what benchmarks/results/block_memory.json measured. A block that is checkpointed keeps its input, and
selective checkpointing what products and attention give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain.config import Backbone, Run
from pretrain.facts import DataFacts
from pretrain.models.internimage_config import STEM_STRIDE, InternImageConfig
from pretrain.models.timm_encoders import SwinSize, ViTSize
from pretrain.objective import Target
from pretrain.plan.flops import (
    IMAGE_EMBEDDED,
    LABEL_EMBEDDED,
    grid_of,
    kinds_of,
    num_owned,
    output_width,
    share_of,
    size_of,
    width_of,
)
from pretrain.plan.settings import Keeps
from pretrain.served import active_targets


@dataclass(frozen=True)
class Kept:
    """Of an image of the batch, in numbers of the model's precision."""

    encoder: float
    decoder: float
    heads: float
    text: float
    working: float  # what the largest layer's backward pass holds at once beside what was kept
    block: float  # what the largest checkpointed block keeps while its backward pass runs

    @property
    def total(self) -> float:
        return self.encoder + self.decoder + self.heads + self.text


@dataclass(frozen=True)
class BlockKeeps:
    """Numbers a value of a block's map, by the choice of checkpointing."""

    fused: dict[Keeps, float]  # by the kernels of a GPU
    plain: dict[Keeps, float]


# Block of InternImage-H: measured, with its input; `fused` keeps less where nothing is computed again.
INTERNIMAGE_BLOCK = BlockKeeps(
    {"none": 14.1, "selective": 9.9, "full": 1.0}, {"none": 17.2, "selective": 9.9, "full": 1.0}
)


def transformer_keeps(width: int, ffn: int, keeps: Keeps = "none") -> float:
    """Numbers a token of one block."""
    return {"none": 8 * width + 2 * ffn, "selective": 6 * width + ffn, "full": width}[keeps]


def kept(run: Run, facts: DataFacts, keeps: Keeps, *, is_fused: bool = True, bytes_a_number: int = 2) -> Kept:
    """Of one image of the batch; `is_fused`: by the GPU's kernels. What is float32 whatever the model's precision
    counts as several numbers.
    """
    wide = 4 / bytes_a_number
    targets, views = active_targets(run, facts), run.objective.input.views
    encoder, working, block = ENCODERS[run.backbone.family](
        size_of(run.backbone), run.backbone, run.views.size, keeps, is_fused
    )
    share = views / run.objective.input.mixed
    kinds, text = kinds_of(targets), run.text
    captions = text.length * (text.layers * transformer_keeps(text.width, text.ffn) + text.width)
    return Kept(
        share * encoder,
        views * sum(_decoder(run, facts, target, wide) for target in targets.values()),
        views * _heads(run, facts, targets, wide),
        views * captions if "text" in kinds else 0.0,
        share * working,
        share * block,
    )


def _vit(
    size: ViTSize, backbone: Backbone, pixels: int, keeps: Keeps, is_fused: bool
) -> tuple[float, float, float]:
    tokens = (pixels // size.patch) ** 2 + 1
    whole = tokens * transformer_keeps(size.width, 4 * size.width)
    blocks = size.depth * tokens * transformer_keeps(size.width, 4 * size.width, keeps)
    ends = 3 * pixels**2 + 2 * tokens * size.width  # the images, and the last norm's input and output
    return blocks + ends, tokens * 8 * size.width, whole


def _swin(
    size: SwinSize, backbone: Backbone, pixels: int, keeps: Keeps, is_fused: bool
) -> tuple[float, float, float]:
    """Attention sees windows, which cover more than the grid where it is no multiple; every second block shifts
    them, and keeps its biases and masks of all windows.
    """
    grid, total, whole = pixels // size.patch, 3.0 * pixels**2, 0.0
    for stage, (depth, heads) in enumerate(zip(size.depths, size.heads, strict=True)):
        width = size.embed * 2**stage
        if stage:
            grid //= 2
            total += 2 * grid**2 * 2 * width  # four tokens as one, before and after their norm
        window = min(size.window, grid)
        padded = (-(-grid // window) * window) ** 2
        # qkv and what they are made of and give, on windows
        outside = transformer_keeps(width, 4 * width, keeps) - (0 if keeps == "full" else 5 * width)
        block = grid**2 * outside + padded * (0 if keeps == "full" else 5 * width)
        masks = padded * window**2 * heads if window < grid and keeps != "full" else 0
        total += depth * block + depth // 2 * masks
        whole = max(whole, grid**2 * transformer_keeps(width, 4 * width) + masks)
    last = 2 * grid**2 * size.width
    return total + last, (pixels // size.patch) ** 2 * 8 * size.embed, whole


def _internimage(
    size: InternImageConfig, backbone: Backbone, pixels: int, keeps: Keeps, is_fused: bool
) -> tuple[float, float, float]:
    block = INTERNIMAGE_BLOCK.fused if is_fused else INTERNIMAGE_BLOCK.plain
    # Images, three maps of the stem's first half and two of its second
    total = 3 * pixels**2 + 3 * (pixels // 2) ** 2 * size.channels / 2
    total += 2 * (pixels // STEM_STRIDE) ** 2 * size.channels
    for width, stride, depth in zip(size.widths, size.strides, size.depths, strict=True):
        values = (pixels // stride) ** 2 * width
        total += values * (depth * block[keeps] + size.has_stage_norm)
        if stride < size.strides[-1]:
            total += values / 2  # twice as wide on a quarter of the positions, kept by the norm behind
    fine, coarse = (
        (pixels // stride) ** 2 * w for stride, w in zip(size.strides[-2:], size.widths[-2:], strict=True)
    )
    first = (pixels // STEM_STRIDE) ** 2 * size.channels
    return total + fine + coarse, first * 2 * size.mlp_ratio, first * block["none"]


ENCODERS: dict[str, Callable[[Any, Backbone, int, Keeps, bool], tuple[float, float, float]]] = {
    "internimage": _internimage,
    "swin": _swin,
    "vit": _vit,
}


def _decoder(run: Run, facts: DataFacts, target: Target, wide: float) -> float:
    """Of the decoder, its prediction and the target in float32."""
    if target.kind not in ("pixels", "dense"):
        return 0.0
    width, tokens = width_of(run.backbone), grid_of(run) ** 2
    out = output_width(run, facts, target)
    scored = tokens * out * 2 * wide  # the target, and the difference or softmax
    if not target.is_decoded:
        return share_of(run, target) * (tokens * width + scored)
    decoder, owned = run.decoder, num_owned(run, target)
    blocks = decoder.layers * (owned + tokens) * transformer_keeps(decoder.width, decoder.ffn)
    ends = owned * width + tokens * (2 * decoder.width + 2 * decoder.width)  # read; places; last norm
    return share_of(run, target) * (blocks + ends + scored)


def _heads(run: Run, facts: DataFacts, targets: dict[str, Target], wide: float) -> float:
    kinds, width, tokens = kinds_of(targets), width_of(run.backbone), grid_of(run) ** 2
    embeddings = bool(kinds & set(LABEL_EMBEDDED)) + bool(kinds & set(IMAGE_EMBEDDED))
    pooled = 5 * tokens * width if run.pool.kind == "attention" else tokens * width
    spread = 2 * tokens * width  # tokens repeated for each image, for both sides of the balance
    projection, clusters, tags = run.projection, run.clusters, run.tags
    total = spread + embeddings * (pooled + 4 * run.pool.width)
    if "global" in kinds:
        total += 2 * (4 * projection.hidden + 4 * projection.width)
    if "clusters" in kinds:
        total += 4 * clusters.hidden + wide * 3 * clusters.prototypes
    if "tags" in kinds:
        total += tokens * (width + tags.width * (1 + 3 * tags.layers)) + 6 * wide * len(facts.tags)
    return total + wide * 3 * len(facts.categories) * ("category" in kinds)
