"""Is the precision that is told that of pycocotools?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pretrain.transfer.average_precision import MEASURES, average_precision, truth_of
from pretrain.transfer.coco import outline_of
from pretrain.transfer.examples import Federation
from pretrain.transfer.federated import federated_precision

NAMES = {3: "cat", 7: "dog"}
SIZES = {number: (100, 120) for number in (11, 12, 13)}


def thing(image_id: int, category_id: int, box: list[float], **more: float) -> dict:
    mask = np.zeros((100, 120), np.uint8)
    left, top, width, height = map(int, box)
    mask[top : top + height, left : left + width] = 1
    about = {"image_id": image_id, "category_id": category_id, "bbox": box, "segmentation": outline_of(mask)}
    return about | {"area": width * height} | more


TRUTH = [
    thing(11, 3, [10, 10, 20, 30], iscrowd=0),
    thing(11, 7, [50, 40, 40, 40], iscrowd=0),
    thing(12, 3, [0, 0, 60, 50], iscrowd=0),
    thing(12, 3, [70, 60, 30, 30], iscrowd=1),
    thing(13, 7, [20, 20, 10, 10], iscrowd=0),
]
FOUND = [
    thing(11, 3, [12, 10, 20, 30], score=0.9),
    thing(11, 7, [45, 40, 40, 45], score=0.6),
    thing(11, 7, [0, 80, 15, 15], score=0.7),
    thing(12, 3, [0, 0, 50, 50], score=0.8),
    thing(12, 3, [75, 60, 20, 30], score=0.75),
    thing(13, 7, [20, 22, 10, 10], score=0.3),
    thing(13, 3, [20, 22, 10, 10], score=0.5),
]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_measures_are_those_of_pycocotools_on_the_files(kind: str, tmp_path: Path) -> None:
    images = [{"id": number, "height": h, "width": w} for number, (h, w) in SIZES.items()]
    numbered = [{**one, "id": 100 + place} for place, one in enumerate(TRUTH)]
    categories = [{"id": number, "name": name} for number, name in NAMES.items()]
    (tmp_path / "truth.json").write_text(
        json.dumps({"images": images, "annotations": numbered, "categories": categories})
    )
    (tmp_path / "found.json").write_text(json.dumps(FOUND))
    truth = COCO(str(tmp_path / "truth.json"))
    judge = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), kind)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    told = average_precision(truth_of(SIZES, TRUTH, NAMES), FOUND, kind)
    assert [told[name] for name in MEASURES] == [None if value < 0 else value for value in judge.stats]
    assert told["accuracy"] == told["AP"] and 0 < told["AP"] < 1


def test_things_without_an_area_have_that_of_their_outlines() -> None:
    """A triangle, a mask and a box; one that is told is kept."""
    triangle = {"segmentation": [[10, 10, 50, 10, 10, 50]]}
    things = [
        thing(11, 3, [10, 10, 40, 40]) | more for more in (triangle, {}, {"segmentation": []}, {"area": 7})
    ]
    for one in things[:3]:
        del one["area"]
    things[1]["segmentation"] = outline_of(np.eye(100, 120, dtype=np.uint8))
    areas = [one["area"] for one in truth_of(SIZES, things, NAMES).dataset["annotations"]]
    assert areas == [pytest.approx(800, rel=0.05), 100, 1600, 7]


def test_a_hand_computed_precision() -> None:
    """Two things, found at 0.9 and at 0.5 with a false one at 0.7 between: 1 up to recall 1/2, then 2/3."""
    truth = [thing(11, 3, [10, 10, 20, 20], iscrowd=0), thing(12, 3, [10, 10, 20, 20], iscrowd=0)]
    found = [
        thing(11, 3, [10, 10, 20, 20], score=0.9),
        thing(12, 3, [80, 60, 20, 20], score=0.7),
        thing(12, 3, [10, 10, 20, 20], score=0.5),
    ]
    told = average_precision(truth_of(SIZES, truth, {3: "cat"}), found, "bbox")
    assert told["AP"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    assert told["by_category"] == {"cat": pytest.approx(told["AP"])}


def test_the_interval_holds_the_precision_and_repeats() -> None:
    truth = truth_of(SIZES, TRUTH, NAMES)
    low, high = average_precision(truth, FOUND, "bbox")["interval"]
    told = average_precision(truth, FOUND, "bbox")
    assert low < told["AP"] < high and told["interval"] == [low, high]
    exact = average_precision(truth, [{**one, "score": 1.0} for one in TRUTH if not one["iscrowd"]], "bbox")
    assert exact["AP"] == pytest.approx(1) and exact["interval"] == pytest.approx([1, 1])


def test_no_detections_are_no_precision() -> None:
    told = average_precision(truth_of(SIZES, TRUTH, NAMES), [], "segm")
    assert told["AP"] == 0 and told["interval"] == [0, 0]


def test_masks_are_small_or_large_by_their_own_area() -> None:
    """A wrong diagonal is small, though its box is large: it costs no precision among the large ones."""
    truth = truth_of(SIZES, [thing(11, 3, [0, 0, 100, 100], iscrowd=0)], NAMES)
    diagonal = {"segmentation": outline_of(np.eye(100, 120, dtype=np.uint8)), "score": 0.9}
    found = [{**thing(12, 3, [0, 0, 100, 100]), **diagonal}, thing(11, 3, [0, 0, 100, 100], score=0.5)]
    told = average_precision(truth, found, "segm")
    assert (told["APl"], told["AP"]) == (pytest.approx(1), pytest.approx(0.5))


def federation(negative: set[int] = frozenset(), not_exhaustive: set[int] = frozenset()) -> Federation:
    """Of image 12 both sets; the other images say nothing."""
    nothing = dict.fromkeys(SIZES, frozenset())
    return Federation(
        nothing | {12: frozenset(negative)},
        nothing | {12: frozenset(not_exhaustive)},
        {3: "r", 7: "f"},
    )


CAT = thing(11, 3, [10, 10, 20, 20])
DOG = thing(12, 7, [0, 0, 100, 100])
FOUND_CAT = {**CAT, "score": 0.5}
WRONG_CAT = thing(12, 3, [10, 10, 20, 20], score=0.9)


@pytest.mark.parametrize(
    ("known", "precision"),
    [
        (federation(), 1.0),  # nothing is known of cats in image 12: its detection is not judged
        (federation(negative={3}), 0.5),  # there is none: one of two detections is right
        (federation(negative={3}, not_exhaustive={3}), 1.0),  # there may be one: the detection is passed over
    ],
)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_hand_computed_precision_where_absent_categories_are_unknown(
    known: Federation, precision: float, kind: str
) -> None:
    found = [FOUND_CAT, WRONG_CAT, {**DOG, "score": 0.1}]
    told = federated_precision(truth_of(SIZES, [CAT, DOG], NAMES), known, found, kind)
    assert (told["APr"], told["APf"], told["APc"]) == (pytest.approx(precision), pytest.approx(1), None)
    assert told["AP"] == told["accuracy"] == pytest.approx((precision + 1) / 2)
    assert (told["APs"], told["APm"], told["APl"]) == (pytest.approx(precision), None, pytest.approx(1))
    assert told["by_category"] == {"cat": pytest.approx(precision), "dog": pytest.approx(1)}
    low, high = told["interval"]
    assert low <= told["AP"] <= high <= 1 and told["AR300"] == pytest.approx(1)
    assert "LVIS" in told["measure"] and "LVIS" in told["metric"]


def test_only_the_best_300_detections_of_an_image_are_judged() -> None:
    """Of all categories together: 300 wrong dogs leave no room for the cat of a lower score."""
    dogs = [thing(11, 7, [0, 80, 15, 15], score=0.9) for _ in range(300)]
    known, truth = federation(), truth_of(SIZES, [CAT, DOG], NAMES)
    assert federated_precision(truth, known, [*dogs, FOUND_CAT], "bbox")["APr"] == 0
    assert federated_precision(truth, known, [*dogs[1:], FOUND_CAT], "bbox")["APr"] == pytest.approx(1)


def test_on_exhaustive_annotations_without_crowds_lvis_judges_as_coco() -> None:
    """Where everything is known of every image, the federated rules pass over nothing."""
    truth = [one for one in TRUTH if not one["iscrowd"]]
    every = dict.fromkeys(SIZES, frozenset(NAMES))
    known = Federation(every, dict.fromkeys(SIZES, frozenset()), dict.fromkeys(NAMES, "c"))
    told = federated_precision(truth_of(SIZES, truth, NAMES), known, FOUND, "segm")
    as_coco = average_precision(truth_of(SIZES, truth, NAMES), FOUND, "segm")
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "interval", "by_category"):
        assert told[name] == pytest.approx(as_coco[name]), name
    assert told["AR300"] == pytest.approx(as_coco["AR100"])
