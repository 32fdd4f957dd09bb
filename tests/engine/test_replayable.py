"""Is a refused step run again from the newest checkpoint on its own way, and does that one stay?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.evidence import BUNDLES, REFUSED
from pretrain.replayable import checkpoint_before, needed
from tests.engine.test_checkpoint import whole


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Of a run that went back from step 9 to step 3 without batches 4 and 5, and has saved step 9 on the new way."""
    for step, left_out in ((0, []), (3, []), (6, []), (9, [4, 5, 9, 10])):
        whole(tmp_path / "checkpoints", step, guard={"left_out": left_out})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    ("step", "without", "expected"),
    [
        (8, set(), 6),  # on the old way, although the run has given that one up
        (9, {9}, 6),  # the second in a row there: step 9 was overwritten on the new way
        (6, {6}, 6),  # the second in a row, right behind the checkpoint
        (7, {4, 5, 9, 10}, 3),  # on the new way, on which step 6 was not saved
        (10, {4, 5, 9, 10}, 9),
        (2, {0}, 0),
    ],
)
def test_it_has_taken_the_same_batches(place: Path, step: int, without: set[int], expected: int) -> None:
    assert checkpoint_before(place, step, without) == place / f"step_{expected:06d}"


def test_without_one_it_is_told(place: Path) -> None:
    (place / "step_000000" / "COMPLETE").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint on the way to step 2 lies in .*cannot be run"):
        checkpoint_before(place, 2, set())


def test_what_the_newest_bundles_need_comes_first(place: Path) -> None:
    for step, batch, left_out in ((4, 4, []), (7, 7, []), (10, 14, [4, 5, 9, 10]), (11, 15, None)):
        bundle = place.parent / BUNDLES / f"step_{step:06d}-batch_{batch:06d}"
        bundle.mkdir(parents=True)
        told = {"step": step, "left_out": left_out}
        (bundle / REFUSED).write_text(json.dumps(told) if left_out is not None else "{")
    assert needed(place.parent, place) == [9, 6, 3]
