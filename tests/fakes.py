"""What do a run and a batch look like that a CPU test can do without any data set?"""

from __future__ import annotations

from dataclasses import replace

import torch

from pretrain.config import Run
from pretrain.data.batch import MOST_TAGS, NO_CATEGORY, NO_TAG, Batch
from pretrain.facts import DataFacts

FACTS = DataFacts(
    categories=("apple", "boat", "cat", "door", "egg"),
    vocab_size=100,
    tags=("fruit", "pet", "red", "round", "sea", "wood"),
    guide_width=24,
    guide_codes=10,
)
MASK_PATCH = {"internimage": 16, "swin": 32, "vit": 16}  # pixels, by family: what one token covers


def random_batch(run: Run, num_images: int, seed: int = 0) -> Batch:
    """Random views with random crops; even images have a category, odd ones a caption.

    All have 1 to 3 tags where a target is about tags."""
    generator = torch.Generator().manual_seed(seed)
    grid, size = run.grid, run.views.size
    second = round(run.mask.ratio * grid**2) if run.objective.input.hides else 0
    num_inputs = num_images * run.objective.input.views // run.objective.input.mixed
    mask = torch.zeros(num_inputs, grid**2, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(grid**2, generator=generator)[:second]] = True
    boxes = torch.rand(num_images, 2, 5, generator=generator)
    boxes = torch.cat([boxes[..., :2] * 20, 40 + boxes[..., 2:4] * 40, boxes[..., 4:].round()], dim=-1)
    is_even = torch.arange(num_images) % 2 == 0
    tokens = torch.randint(5, FACTS.vocab_size, (num_images, run.text.length), generator=generator)
    has_token = ~is_even[:, None] & (torch.arange(run.text.length) < run.text.length // 2)
    views = torch.randint(0, 256, (num_images, 2, 3, size, size), dtype=torch.uint8, generator=generator)
    has_tags = any(target.kind == "tags" for target in run.objective.targets.values())
    tags = torch.full((num_images, MOST_TAGS if has_tags else 0), NO_TAG)
    for row in tags[: num_images * has_tags]:
        num_tags = int(torch.randint(1, 4, (1,), generator=generator))
        row[:num_tags] = torch.randperm(len(FACTS.tags), generator=generator)[:num_tags]
    return Batch(
        views=views,
        boxes=boxes,
        sizes=torch.full((num_images, 2), 100.0),
        mask=mask.view(-1, grid, grid),
        category=torch.where(is_even, torch.arange(num_images) % len(FACTS.categories), NO_CATEGORY),
        tokens=torch.where(has_token, tokens, 0),
        token_mask=has_token,
        tags=tags,
        has_tags=torch.full((num_images,), has_tags),
        position=torch.arange(num_images),
    )


def shrink(run: Run) -> Run:
    """The same run at three steps of four inputs: its own structure at sizes that a CPU test can run."""
    size, patch = 64, max(MASK_PATCH[run.backbone.family], run.mask.patch)
    patches = (size // patch) ** 2
    mask = replace(run.mask, patch=patch, ratio=round(run.mask.ratio * patches) / patches)
    return replace(
        run,
        batch=4 * run.objective.input.mixed,
        steps=3,
        save_every=3,
        log_every=1,
        decoder=replace(run.decoder, layers=1, width=64, ffn=128, heads=4),
        pool=replace(run.pool, heads=4, width=48),
        projection=replace(run.projection, hidden=64, width=32, dense_samples=4),
        tags=replace(run.tags, layers=1, width=32, ffn=64, chunk=4),
        clusters=replace(run.clusters, prototypes=12, hidden=32, width=16),
        text=replace(run.text, layers=1, width=32, ffn=64, heads=4, length=16),
        backbone=replace(run.backbone, size=f"{run.backbone.family}_tiny", token_width=64),
        views=replace(run.views, size=size),
        mask=replace(mask, min_block=patches // 4) if mask.shape == "blocks" else mask,
        optim=replace(run.optim, warmup=1),
    )
