"""How precise are detections where absent categories of an image are unknown? LVIS's own measures.

Federated rules (arXiv 1908.03195, section 2): of an image are judged the categories that it has or is known not to
have, and where not all things of a category are annotated, detections that match none are passed over. Matching and
summing are pycocotools'; `benchmarks/lvis_agreement.py` compares with the lvis package.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from pretrain.transfer.average_precision import (
    Annotation,
    by_category,
    judge_of,
)
from pretrain.transfer.examples import Federation
from pretrain.transfer.interval import PATIENCE, Matches, interval_of
from pretrain.transfer.lvis import FREQUENCIES

MOST = 300  # detections of an image, of all its categories together


def federated_precision(
    truth: COCO, federation: Federation, detections: Sequence[Annotation], kind: str
) -> dict[str, Any]:
    """LVIS's measures of `kind` "bbox" or "segm", AP by category, and the 95 % interval of AP (`interval_of`).

    AP, AP50 and AP75; APs, APm and APl by area; APr, APc and APf by how often a category occurs; recalls of 300
    detections. Detections are in COCO's format of results, of which the MOST best of an image are judged. A measure
    that nothing in the truth asks for is None. Crowds are things like others, as in the lvis package.
    """
    kept = best_of_each_image(detections, MOST)
    judge = judge_of(truth, kept, kind)
    judge.params.maxDets = [MOST]
    matches = _matches(judge, federation)  # by category, by area
    summed = [accumulated(judge, [list(area.values()) for area in row]) for row in matches]
    precision = np.concatenate([one["precision"] for one in summed], axis=2)[..., 0]
    recall = np.concatenate([one["recall"] for one in summed], axis=1)[..., 0]
    measured = _measures(judge, federation, precision, recall)
    return {
        "accuracy": measured["AP"],
        "metric": f"{kind} AP of LVIS",
        "measure": f"LVIS's federated, matched by pycocotools; {MOST} detections an image",
        "interval": interval_of(judge, [row[0] for row in matches], measured["AP"]),
        "n": len(judge.params.imgIds),
        "detections": len(kept),
        **measured,
        "by_category": by_category(judge, precision[..., 0]),
    }


def best_of_each_image(detections: Sequence[Annotation], most: int) -> list[Annotation]:
    """The `most` of highest score of each image; of equal ones the first, as the lvis package has it."""
    of_image: dict[int, list[Annotation]] = defaultdict(list)
    for one in detections:
        of_image[one["image_id"]].append(one)
    return [
        one
        for found in of_image.values()
        for one in (found if len(found) <= most else sorted(found, key=lambda d: -d["score"])[:most])
    ]


def _matches(judge: COCOeval, federation: Federation) -> list[list[Matches]]:
    """By category and area the matches of those images that the category is judged in, in the order of the images.

    Only pairs of an image and a category that have something are looked at: LVIS has 24 million others.
    """
    params = judge.params
    ignored = {number for number, thing in judge.cocoGt.anns.items() if thing.get("ignore")}
    for thing in judge.cocoGt.anns.values():
        thing["iscrowd"] = 0
    judge._prepare()
    for number in ignored:  # of which pycocotools makes what iscrowd says
        judge.cocoGt.anns[number]["ignore"] = 1
    place_of = {image: place for place, image in enumerate(params.imgIds)}
    judged: dict[int, list[int]] = defaultdict(list)
    for image, category in judge._gts.keys() | judge._dts.keys():
        if (image, category) in judge._gts or category in federation.negative[image]:
            judged[category].append(image)
    found: list[list[Matches]] = []
    for category in tqdm(params.catIds, desc="matching", unit=" category", delay=PATIENCE, mininterval=1.0):
        images = sorted(judged[category])
        for image in images:
            judge.ious[image, category] = judge.computeIoU(image, category)
        row = [
            {place_of[i]: _match(judge, federation, i, category, area) for i in images}
            for area in params.areaRng
        ]
        found.append(row)
    return found


def _match(
    judge: COCOeval, federation: Federation, image: int, category: int, area: list[float]
) -> dict[str, Any]:
    found = judge.evaluateImg(image, category, area, MOST)
    if category in federation.not_exhaustive[image]:
        found["dtIgnore"] = found["dtIgnore"] | (found["dtMatches"] == 0)
    return found


def accumulated(judge: COCOeval, matches: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """pycocotools' precision [t, r, 1, areas, 1] and recall [t, 1, areas, 1] of one category.

    `matches` has for each area, of the first of the judge's, as many images' matches.
    """
    params = copy.copy(judge.params)
    params.imgIds, params.catIds, params.maxDets = list(range(len(matches[0]))), [0], params.maxDets[-1:]
    params.areaRng, params.areaRngLbl = (kept[: len(matches)] for kept in (params.areaRng, params.areaRngLbl))
    sample = copy.copy(judge)
    sample.params = sample._paramsEval = params
    sample.evalImgs = [one for area in matches for one in area]
    with contextlib.redirect_stdout(io.StringIO()):
        sample.accumulate()
    return sample.eval


def _measures(
    judge: COCOeval, federation: Federation, precision: np.ndarray, recall: np.ndarray
) -> dict[str, float | None]:
    """By name the means of what there is; precision [t, r, k, areas] and recall [t, k, areas] have -1 elsewhere."""
    thresholds = judge.params.iouThrs
    frequency = np.array([federation.frequency[category] for category in judge.params.catIds])
    parts = {"AP": precision[..., 0]}
    parts |= {f"AP{t}": precision[np.isclose(thresholds, t / 100)][..., 0] for t in (50, 75)}
    parts |= {f"AP{size}": precision[..., place] for place, size in enumerate("sml", 1)}
    parts |= {f"AP{often}": precision[:, :, frequency == often, 0] for often in FREQUENCIES}
    parts |= {f"AR{MOST}": recall[..., 0]}
    parts |= {f"AR{size}": recall[..., place] for place, size in enumerate("sml", 1)}
    return {
        name: float(part[part > -1].mean()) if (part > -1).any() else None for name, part in parts.items()
    }
