"""How precise are detections? COCO's own measures, computed by pycocotools, and how sure they are."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

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
DRAWS = 100  # bootstrap samples of the interval
NORMAL_95 = 1.96  # standard deviations to each side of 95 %
SEED = 0  # of the bootstrap: one set of detections has one interval
Annotation = Mapping[str, Any]


def truth_of(
    sizes: Mapping[int, tuple[int, int]], things: Iterable[Annotation], names: Mapping[int, str]
) -> COCO:
    """COCO's object of images (height, width by number), annotations and categories (name by number).

    Annotations are numbered anew, from 1: pycocotools takes one with number 0 for unmatched.
    """
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number, "height": h, "width": w} for number, (h, w) in sizes.items()],
        "annotations": [{"iscrowd": 0, **thing, "id": number} for number, thing in enumerate(things, 1)],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
    }
    for thing in truth.dataset["annotations"]:
        thing.setdefault("area", thing["bbox"][2] * thing["bbox"][3])
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def average_precision(truth: COCO, detections: Sequence[Annotation], kind: str) -> dict[str, Any]:
    """COCO's twelve measures of `kind` "bbox" or "segm", AP by category, and the 95 % interval of AP.

    Detections are in COCO's format of results. The interval is 1.96 standard deviations of AP, over DRAWS samples of
    the images with replacement, to both sides of it, inside [0, 1]: percentiles of such samples lie too high, since
    AP rises where images come twice. A measure that nothing in the truth asks for is None. Source: cocodataset.org.
    """
    # Of a detection with a box, loadRes takes the area of the box, by which a mask would be sorted into s, m and l.
    left_out = {"bbox"} if kind == "segm" else set()
    judged = [{k: copy.deepcopy(v) for k, v in one.items() if k not in left_out} for one in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(judged) if judged else _nothing(truth)
        judge = COCOeval(truth, found, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    measured = {
        name: None if value < 0 else float(value) for name, value in zip(MEASURES, judge.stats, strict=True)
    }
    precision = judge.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, categories], all areas
    by_category = {
        truth.cats[number]["name"]: float(precision[:, :, place].mean())
        for place, number in enumerate(judge.params.catIds)
        if (precision[:, :, place] > -1).all()
    }
    return {
        "accuracy": measured["AP"],
        "metric": f"{kind} AP",
        "interval": _interval(judge, measured["AP"]),
        "n": len(judge.params.imgIds),
        "detections": len(detections),
        **measured,
        "by_category": by_category,
    }


def _interval(judge: COCOeval, told: float | None) -> list[float] | None:
    """Two bounds about the AP that was told; matches of the samples are as they were found."""
    params = copy.deepcopy(judge.params)
    num_images, num_categories, num_areas = len(params.imgIds), len(params.catIds), len(params.areaRng)
    matches = np.array(judge.evalImgs, dtype=object).reshape(num_categories, num_areas, num_images)[:, :1]
    params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
    params.maxDets, params.imgIds = params.maxDets[-1:], list(range(num_images))
    sample, generator, drawn = copy.copy(judge), np.random.default_rng(SEED), []
    sample.params = sample._paramsEval = params
    for _ in range(DRAWS):
        sample.evalImgs = matches[:, :, generator.integers(num_images, size=num_images)].ravel().tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            sample.accumulate()
        precision = sample.eval["precision"]
        if (precision > -1).any():
            drawn.append(precision[precision > -1].mean())
    if told is None:
        return None
    margin = NORMAL_95 * float(np.std(drawn))
    return [max(told - margin, 0.0), min(told + margin, 1.0)]


def _nothing(truth: COCO) -> COCO:
    found = COCO()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found
