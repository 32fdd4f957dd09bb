"""How precise are detections? COCO's own measures, computed by pycocotools, and how sure they are."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from pretrain.transfer.coco import compressed
from pretrain.transfer.interval import PATIENCE, interval_of

MEASURES = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)  # as it sums up
Annotation = Mapping[str, Any]


def truth_of(
    sizes: Mapping[int, tuple[int, int]], things: Iterable[Annotation], names: Mapping[int, str]
) -> COCO:
    """COCO's object of images (height, width by number), annotations and categories (name by number).

    Annotations are numbered anew, from 1: pycocotools takes one with number 0 for unmatched. One without `area`, of
    which pycocotools would ask, has that of its outline, or of its box without one.
    """
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number, "height": h, "width": w} for number, (h, w) in sizes.items()],
        "annotations": [{"iscrowd": 0, **thing, "id": number} for number, thing in enumerate(things, 1)],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
    }
    for thing in truth.dataset["annotations"]:
        if "area" not in thing:
            thing["area"] = _area(thing, *sizes[thing["image_id"]])
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _area(thing: Annotation, height: int, width: int) -> float:
    if outline := thing.get("segmentation"):
        return float(rle.area(compressed(outline, height, width)))
    return float(thing["bbox"][2] * thing["bbox"][3])


def average_precision(truth: COCO, detections: Sequence[Annotation], kind: str) -> dict[str, Any]:
    """COCO's twelve measures of `kind` "bbox" or "segm", AP by category, and the 95 % interval of AP.

    Detections are in COCO's format of results. The interval is that of `interval_of`. A measure that nothing in the
    truth asks for is None. Source: cocodataset.org.
    """
    judge = judge_of(truth, detections, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        _match(judge)
        judge.accumulate()
        judge.summarize()
    measured = {
        name: None if value < 0 else float(value) for name, value in zip(MEASURES, judge.stats, strict=True)
    }
    num_categories, num_areas = len(judge.params.catIds), len(judge.params.areaRng)
    found = np.array(judge.evalImgs, dtype=object).reshape(num_categories, num_areas, -1)[:, 0]
    matches = [{place: one for place, one in enumerate(row) if one is not None} for row in found]
    return {
        "accuracy": measured["AP"],
        "metric": f"{kind} AP",
        "measure": "COCO's, by pycocotools",
        "interval": interval_of(judge, matches, measured["AP"]),
        "n": len(judge.params.imgIds),
        "detections": len(detections),
        **measured,
        "by_category": by_category(judge, judge.eval["precision"][:, :, :, 0, -1]),
    }


def judge_of(truth: COCO, detections: Sequence[Annotation], kind: str) -> COCOeval:
    """pycocotools' own, about to compare copies of the detections with the truth."""
    # Of a detection with a box, loadRes takes the area of the box, by which a mask would be sorted into s, m and l.
    left_out = {"bbox"} if kind == "segm" else set()
    judged = [{k: copy.deepcopy(v) for k, v in one.items() if k not in left_out} for one in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        return COCOeval(truth, truth.loadRes(judged) if judged else _nothing(truth), kind)


def _match(judge: COCOeval) -> None:
    """pycocotools' evaluate, which takes minutes for thousands of images, with a bar."""
    params, match = judge.params, judge.evaluateImg
    total = len(params.catIds) * len(params.areaRng) * len(params.imgIds)
    with tqdm(
        total=total, desc="matching", unit=" match", unit_scale=True, delay=PATIENCE, mininterval=1.0
    ) as bar:

        def counted(*asked: Any) -> Any:
            bar.update()
            return match(*asked)

        judge.evaluateImg = counted
        judge.evaluate()


def by_category(judge: COCOeval, precision: Float[np.ndarray, "t r k"]) -> dict[str, float]:
    """AP by name of those categories that something is judged of; thresholds, recalls, categories."""
    return {
        judge.cocoGt.cats[number]["name"]: float(precision[:, :, place].mean())
        for place, number in enumerate(judge.params.catIds)
        if (precision[:, :, place] > -1).all()
    }


def _nothing(truth: COCO) -> COCO:
    found = COCO()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found
