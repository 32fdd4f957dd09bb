"""Pre-training by any row of the table of objectives: at its paper's size, or small on the scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from pretrain.config import Mask, Run, Source
from pretrain.objective import Objective
from pretrain.objectives import HVP, MVP, OBJECTIVES
from pretrain.recipes import hvp, m3i, mvp

EPOCHS = 400  # of ImageNet-1k: the paper's comparison of single instances (M3I, arXiv 2211.09807)
PIXEL_RATIO, FEATURE_RATIO = 0.75, 0.625  # hidden: MAE; near the 0.6 of SiameseIM, whole on 8 x 8 and 16 x 16


def _mask(objective: Objective, mask: Mask, grid: int) -> Mask:
    """As many patches hidden as the row's first user hides, and in the same shape; a mixed input keeps its half."""
    targets = list(objective.targets.values())
    if any(not target.is_standardised for target in targets):  # SimMIM, and HVP-MTL
        return replace(mask, ratio=round(hvp.MASK.ratio * grid**2) / grid**2, shape=hvp.MASK.shape)
    if not objective.input.is_masked or len(targets) > 1:
        return mask
    wanted = PIXEL_RATIO if targets[0].kind == "pixels" else FEATURE_RATIO
    if targets[0].summary:  # MVP: the whole sequence is scored, and less of it hidden
        wanted = mvp.HIDDEN
    return replace(mask, ratio=round(wanted * grid**2) / grid**2)


def _supervised(objective: Objective, data: dict[str, Source]) -> dict[str, Source]:
    """The same sources and weights, without the labels that no target of the row predicts; with tags for rows that
    predict those.
    """
    kinds = {target.kind for target in objective.targets.values()}
    instead = "tags" if "tags" in kinds else "none"
    return {
        name: replace(source, supervision=source.supervision if source.supervision in kinds else instead)
        for name, source in data.items()
    }


def vit_b16(row: str) -> Run:
    """ViT-B/16, 224 px, 400 epochs of ImageNet-1k; a row with texts takes YFCC-15M beside it.

    deepspeed pretrain/main.py --recipe rows.NAME --data imagenet1k=DIR --ds-config ds_configs/zero2.json
        --out DIR
    Expected (paper): fine-tuned top-1 from 77.1 (global distillation) to 83.7 (siamese feature). Not
    run by us at this size.
    """
    run, objective = m3i.vit_b16(), OBJECTIVES[row]
    data = run.data
    if "text" in {target.kind for target in objective.targets.values()}:
        data = data | {"yfcc15m": Source("text")}
    return replace(
        run,
        name=f"rows.{row}",
        objective=objective,
        data=_supervised(objective, data),
        steps=EPOCHS * m3i.IMAGENET_1K // run.batch,
        mask=_mask(objective, run.mask, run.grid),
    )


def demo(row: str) -> Run:
    """`m3i.demo` with another row: the same backbone, images, steps and optimizer, so that rows compare."""
    return small(row, m3i.demo().data)


def small(row: str, data: dict[str, Source]) -> Run:
    """The run of `demo` on other data; labels that no target of the row predicts are left unread."""
    run, objective = m3i.demo(), OBJECTIVES[row]
    weights = {name: target.weight for name, target in run.objective.targets.items()}
    targets = {
        name: replace(target, weight=weights.get(name, target.weight))
        for name, target in objective.targets.items()
    }
    if len(targets) > 1:  # the weight of a single target is a factor of the learning rate
        objective = replace(objective, targets=targets)
    if len({target.group for target in targets.values()}) == 2 and objective.gamma is not None:
        objective = replace(objective, gamma=objective.gamma * m3i.DEMO_GAMMA)
    return replace(
        run,
        name=f"rows.{row}_demo",
        objective=objective,
        data=_supervised(objective, data),
        projection=replace(run.projection, hidden=256, width=64),
        tags=replace(run.tags, layers=1, width=128, ffn=256),
        clusters=replace(run.clusters, prototypes=96, hidden=256, width=64),
        mask=_mask(objective, run.mask, run.grid),
    )


# Rows whose paper has another recipe than M3I's comparison of rows.
OWN: dict[str, Callable[[], Run]] = {row: mvp.vit_b16 for row in MVP} | {
    row: partial(hvp.ablation, row) for row in HVP
}


def full(row: str) -> Run:
    """A row at its paper's size, and in one with the rows that its paper compares it with."""
    return OWN.get(row, partial(vit_b16, row))()


ROWS = tuple(row for row in OBJECTIVES if row != "m3i")  # m3i has recipes of its own
RECIPES: dict[str, Callable[[], Run]] = {row: partial(full, row) for row in ROWS}
RECIPES |= {f"{row}_demo": partial(demo, row) for row in ROWS}
