"""Is the interval that of pycocotools on each sample of the images, one after the other?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval

from pretrain.transfer import average_precision as average_precision_file
from pretrain.transfer import interval
from pretrain.transfer.average_precision import average_precision, truth_of
from pretrain.transfer.examples import Federation
from pretrain.transfer.federated import accumulated, federated_precision
from pretrain.transfer.interval import Matches, precisions
from pretrain.transfer.segment import score
from pretrain.transfer.work import table

IMAGES = range(1, 31)
SIZES = dict.fromkeys(IMAGES, (100, 100))
NAMES = {1: "ant", 2: "bee", 3: "cat", 4: "rare", 5: "absent"}


def one_by_one(judge: COCOeval, matches: Sequence[Matches], times: np.ndarray) -> list[float]:
    """AP of each draw, summed by pycocotools over the matches of its images."""
    drawn = []
    asked = [row for row in matches if any((one["gtIgnore"] == 0).any() for one in row.values())]
    for of_image in times.tolist():
        some = ([one for place, one in row.items() for _ in range(of_image[place])] for row in asked)
        precision = np.concatenate([accumulated(judge, [row])["precision"].ravel() for row in some])
        if (precision > -1).any():
            drawn.append(precision[precision > -1].mean())
    return drawn


def set_of(seed: int, levels: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Things, crowds among them, and detections with scores of so many `levels`."""
    draw = np.random.default_rng(seed)
    truth, found = [], []
    for image in IMAGES:
        for _ in range(draw.integers(0, 7)):
            box = [*draw.uniform(0, 60, 2), *draw.uniform(5, 40, 2)]
            about = {
                "image_id": image,
                "category_id": int(draw.integers(1, 4)),
                "bbox": list(map(float, box)),
            }
            truth.append(about | {"iscrowd": int(draw.random() < 0.1)})
            for _ in range(draw.integers(0, 4)):
                near = [float(side + draw.normal(0, 2)) for side in box]
                near[2:] = [max(side, 1.0) for side in near[2:]]
                found.append(about | {"bbox": near, "score": int(draw.integers(levels)) / levels})
        found.append(
            {
                "image_id": image,
                "category_id": int(draw.integers(1, 6)),
                "bbox": [1.0, 1.0, 9.0, 9.0],
                "score": int(draw.integers(levels)) / levels,
            }
        )
    truth.append({"image_id": 7, "category_id": 4, "bbox": [1.0, 1.0, 9.0, 9.0], "iscrowd": 0})
    return truth, found


def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets `interval_of` compare both ways; how many draws it has compared."""
    compared = []

    def both(judge: COCOeval, matches: Sequence[Matches], times: np.ndarray) -> np.ndarray:
        found = precisions(judge, matches, times)
        np.testing.assert_allclose(found, one_by_one(judge, matches, times), rtol=0, atol=1e-12)
        assert np.std(found) > 0.005
        compared.append(len(found))
        return found

    monkeypatch.setattr(interval, "precisions", both)
    monkeypatch.setattr(interval, "DRAWS", 20)
    return compared


@pytest.mark.parametrize(
    "levels", [3, 10_000]
)  # few scores: many are equal, also right and wrong ones of an image
@pytest.mark.parametrize("at_once", [1, interval.AT_ONCE])
def test_precisions_of_all_draws_at_once_are_those_of_one_after_the_other(
    levels: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interval, "AT_ONCE", at_once)
    compared = checked(monkeypatch)
    truth, found = set_of(levels, levels)
    average_precision(truth_of(SIZES, truth, NAMES), found, "bbox")
    known = Federation(
        dict.fromkeys(IMAGES, frozenset({1, 5})),
        {image: frozenset({2} if image % 3 else ()) for image in IMAGES},
        dict.fromkeys(NAMES, "c"),
    )
    federated_precision(truth_of(SIZES, truth, NAMES), known, found, "bbox")
    assert compared == [20, 20]


def test_a_single_image_has_no_interval() -> None:
    truth, found = ([one for one in of if one["image_id"] == 7] for of in set_of(3, 3))
    boxes = average_precision(truth_of({7: (100, 100)}, truth, NAMES), found, "bbox")
    regions = score(torch.tensor([[[3, 1], [4, 1], [3, 2]]]), ("ant", "bee"))
    for row in (boxes, regions):
        assert row["n"] == 1 and row["accuracy"] is not None and row["interval"] is None
    assert table({"scores": {"bbox": boxes, "mask": regions}}).count("(no interval) of 1 images") == 2
    two = score(torch.tensor([[[3, 1], [4, 1], [3, 2]], [[1, 4], [3, 4], [1, 6]]]), ("ant", "bee"))
    assert len(two["interval"]) == 2 and "(no" not in table({"scores": two})


def test_draws_that_ask_for_nothing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = checked(monkeypatch)
    truth = [{"image_id": 1, "category_id": 1, "bbox": [1.0, 1.0, 9.0, 9.0]}]
    truth.append(truth[0] | {"image_id": 2})
    found = [{**truth[0], "score": 0.5}, {**truth[1], "score": 0.9, "category_id": 2}]
    average_precision(truth_of(SIZES, truth, NAMES), found, "bbox")
    assert 0 < compared[0] < 20


@pytest.mark.parametrize(("patience", "bars"), [(0.0, ["matching", "interval of AP"]), (60.0, [])])
def test_bars_are_shown_where_it_takes_seconds(
    patience: float, bars: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (average_precision_file, interval):
        monkeypatch.setattr(module, "PATIENCE", patience)
    truth, found = set_of(0, 3)
    average_precision(truth_of(SIZES, truth, NAMES), found, "bbox")
    told = capsys.readouterr().err
    assert [name for name in ("matching", "interval of AP") if f"{name}: 100%" in told] == bars
    assert bool(told) == bool(bars)
