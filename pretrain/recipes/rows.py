"""Pre-training by any single row of the table of objectives: ViT-B/16 on ImageNet-1k, or small on the scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from pretrain.config import Mask, Run, Source
from pretrain.objectives import OBJECTIVES, Objective
from pretrain.recipes import m3i

EPOCHS = 400  # of ImageNet-1k: the paper's comparison of single instances (M3I, arXiv 2211.09807)
PIXEL_RATIO, FEATURE_RATIO = 0.75, 0.625  # hidden: MAE; near the 0.6 of SiameseIM, whole on 8 x 8 and 16 x 16


def _mask(objective: Objective, mask: Mask, grid: int) -> Mask:
    """As many patches hidden as the row's first user hides; a mixed input keeps its half."""
    if not objective.input.is_masked or len(objective.targets) > 1:
        return mask
    is_pixels = next(iter(objective.targets.values())).kind == "pixels"
    wanted = PIXEL_RATIO if is_pixels else FEATURE_RATIO
    return replace(mask, ratio=round(wanted * grid**2) / grid**2)


def _supervised(objective: Objective, data: dict[str, Source]) -> dict[str, Source]:
    """The same sources and weights, without the labels that no target of the row predicts."""
    kinds = {target.kind for target in objective.targets.values()}
    return {
        name: replace(source, supervision=source.supervision if source.supervision in kinds else "none")
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
    run, objective = m3i.demo(), OBJECTIVES[row]
    weights = {name: target.weight for name, target in run.objective.targets.items()}
    targets = {
        name: replace(target, weight=weights.get(name, 1.0)) for name, target in objective.targets.items()
    }
    if len(targets) > 1:  # the weight of a single target is a factor of the learning rate
        objective = replace(objective, targets=targets)
    return replace(
        run,
        name=f"rows.{row}_demo",
        objective=objective,
        data=_supervised(objective, run.data),
        projection=replace(run.projection, hidden=256, width=64),
        mask=_mask(objective, run.mask, run.grid),
    )


ROWS = tuple(row for row in OBJECTIVES if row != "m3i")  # m3i has recipes of its own
RECIPES: dict[str, Callable[[], Run]] = {row: partial(vit_b16, row) for row in ROWS}
RECIPES |= {f"{row}_demo": partial(demo, row) for row in ROWS}
