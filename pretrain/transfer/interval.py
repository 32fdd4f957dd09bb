"""How sure is an average precision?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from pretrain.evaluate.regions import FEWEST

DRAWS = 100  # bootstrap samples
NORMAL_95 = 1.96  # standard deviations to each side of 95 %
SEED = 0  # of the bootstrap: one set of detections has one interval
PATIENCE = 2.0  # seconds before a bar is shown
AT_ONCE = 2**22  # numbers of an array over draws and detections
ALL = -1  # in place of the number of a copy
Matches = Mapping[int, Mapping[str, Any]]  # of one category: place of an image -> pycocotools' matches in it


def interval_of(judge: COCOeval, matches: Sequence[Matches], told: float | None) -> list[float] | None:
    """95 % interval of the AP that was told: two bounds in [0, 1], or None without an AP, and of a single image.

    `matches` are those of all areas by category. 1.96 standard deviations of AP, over DRAWS samples of the images
    with replacement, to both sides: percentiles of such samples lie too high, since AP rises where images come twice.
    """
    num_images, generator = len(judge.params.imgIds), np.random.default_rng(SEED)
    if told is None or num_images < FEWEST:
        return None
    times = np.stack(
        [
            np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)
            for _ in range(DRAWS)
        ]
    )
    margin = NORMAL_95 * float(np.std(precisions(judge, matches, times)))
    return [max(told - margin, 0.0), min(told + margin, 1.0)]


def precisions(
    judge: COCOeval, matches: Sequence[Matches], times: Int[np.ndarray, "d images"]
) -> Float[np.ndarray, " n"]:
    """AP of those draws that ask for something, n <= d; `times` is how often a draw has an image.

    An image that comes twice counts twice, detections and things. Matches are the same in every draw, so that those
    of a category are sorted once, for all draws.
    """
    asked = [row for row in matches if any((one["gtIgnore"] == 0).any() for one in row.values())]
    sums, counts = np.zeros(len(times)), np.zeros(len(times), np.int64)
    for row in tqdm(asked, desc="interval of AP", unit=" category", delay=PATIENCE, mininterval=1.0):
        of_row = times[:, list(row)]
        wanted = of_row @ [np.count_nonzero(one["gtIgnore"] == 0) for one in row.values()]
        found = _sorted(list(row.values()), of_row.max(axis=0))
        at_once = max(1, AT_ONCE // max(1, len(found.image)))
        for first in range(0, len(times), at_once):
            some = slice(first, first + at_once)
            sums[some] += _of_category(judge, found, of_row[some], wanted[some])
        counts += wanted > 0
    return sums[counts > 0] / counts[counts > 0]


@dataclass(frozen=True)
class _Sorted:
    """Detections of one category, highest scores first."""

    image: Int[np.ndarray, " n"]  # place in the row
    copy: Int[np.ndarray, " n"]  # which copy of its image it is of, from 0, or ALL
    right: Bool[np.ndarray, "t n"]
    passed_over: Bool[np.ndarray, "t n"]


def _sorted(row: Sequence[Mapping[str, Any]], most: Int[np.ndarray, " images"]) -> _Sorted:
    """Of equal scores pycocotools takes those of one image together, and those of its copy after all of them.

    Where right and wrong ones of an image have one score, there is one of each for every copy; `most` is how many.
    """
    scores = np.concatenate([one["dtScores"] for one in row])
    matched = np.concatenate([one["dtMatches"] for one in row], axis=1) != 0
    passed_over = np.concatenate([one["dtIgnore"] for one in row], axis=1).astype(bool)
    image = np.repeat(np.arange(len(row)), [len(one["dtScores"]) for one in row])
    order = np.argsort(-scores, kind="mergesort")
    is_new = (np.diff(scores[order], prepend=np.inf) != 0) | (np.diff(image[order], prepend=-1) != 0)
    equal = np.cumsum(is_new) - 1  # number of a group of one image and score
    is_mixed = (np.bincount(equal) > 1) & (np.bincount(equal, weights=matched.any(axis=0)[order]) > 0)
    copies = np.where(is_mixed[equal], most[image[order]], 1)
    place = np.repeat(np.arange(len(order)), copies)
    copy = np.arange(len(place)) - np.repeat(np.cumsum(copies) - copies, copies)
    in_turn = np.lexsort((place, copy, equal[place]))
    place, copy = place[in_turn], copy[in_turn]
    taken = order[place]
    return _Sorted(
        image[taken],
        np.where(is_mixed[equal[place]], copy, ALL),
        (matched & ~passed_over)[:, taken],
        passed_over[:, taken],
    )


def _of_category(
    judge: COCOeval, found: _Sorted, times: Int[np.ndarray, "d images"], wanted: Int[np.ndarray, " d"]
) -> Float[np.ndarray, " d"]:
    """AP of a category in each draw, which wants so many things; 0 where it wants none.

    Precision only rises at a right detection, and so does recall: the rest is counted between them.
    """
    weight = times[:, found.image]
    weight = np.where(found.copy == ALL, weight, weight > found.copy)
    seen, recalls = np.cumsum(weight, axis=1), judge.params.recThrs
    total = np.zeros(len(times))
    for is_right, is_passed_over in zip(found.right, found.passed_over, strict=True):
        (right,), (passed_over,) = np.nonzero(is_right), np.nonzero(is_passed_over)
        num_right = np.cumsum(weight[:, right], axis=1)
        num_passed = np.cumsum(weight[:, passed_over], axis=1)
        num_passed = np.pad(num_passed, ((0, 0), (1, 0)))[:, np.searchsorted(passed_over, right)]
        precision = num_right / (seen[:, right] - num_passed + np.spacing(1))
        highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(recalls, num_right / np.maximum(wanted, 1)[:, None], side="right")
        total += (highest * np.diff(reached, prepend=0)).sum(axis=1) / len(recalls)
    return np.where(wanted > 0, total / len(found.right), 0.0)
