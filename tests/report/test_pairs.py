"""Do the drawn pairs show the samples that training saw?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.config import Run
from pretrain.data.views import cut
from pretrain.report.pairs import Pair, _outline, read_pairs
from pretrain.report.record import read_record
from tests.report.conftest import HOSTILE, small_run, write_data
from tests.report.fake_run import evaluation


def plain_run() -> Run:
    """Crops and flips alone, so that a view can be cut again from its whole image."""
    run = small_run()
    views = replace(run.views, jitter_probability=0, grayscale=0, blur=(0, 0), solarize=(0, 0))
    return replace(run, views=views)


def assert_views_come_from_their_images(pairs: list[Pair], run: Run) -> None:
    for example in (example for pair in pairs for example in pair.examples):
        for view, box in zip(example.views, example.boxes.tolist(), strict=True):
            if any(box):
                again = cut(
                    torch.from_numpy(example.image), tuple(map(int, box[:4])), bool(box[4]), run.views.size
                )
                assert torch.equal(view, again), example.key


def test_views_are_cut_from_the_image_beside_them(data: Path) -> None:
    run = plain_run()
    pairs = read_pairs(run, dict.fromkeys(run.data, data / "train"), None, 4)
    assert_views_come_from_their_images(pairs, run)
    assert {bool(example.boxes[1].any()) for pair in pairs for example in pair.examples[:1]} == {False}
    assert all(pair.mask.mean() == 0.5 for pair in pairs)


def test_captions_are_whole_and_categories_named(data: Path) -> None:
    run = plain_run()
    pairs = read_pairs(run, dict.fromkeys(run.data, data / "train"), None, 4)
    examples = [example for pair in pairs for example in pair.examples]
    for example in examples:
        number = int(example.key.removeprefix("k"))
        if example.source == "captioned":
            assert example.caption == (HOSTILE, "a boat")[number % 2] and example.category is None
        else:
            assert example.category == ("apple", "boat", "cat")[number % 3] and example.caption is None
    assert {example.source for example in examples} == {"captioned", "labelled"}


def test_a_bad_sample_is_replaced_as_in_training(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "train", 6, ["a boat"], broken=2)
    run = plain_run()
    run = replace(run, max_bad=0.5)
    pairs = read_pairs(run, dict.fromkeys(run.data, folder), None, 6)
    assert "k2" not in {example.key for pair in pairs for example in pair.examples}
    assert_views_come_from_their_images(pairs, run)


def test_box_of_a_flipped_view_is_drawn_on_the_image_as_stored(data: Path) -> None:
    run = plain_run()
    example = read_pairs(run, dict.fromkeys(run.data, data / "train"), None, 1)[0].examples[0]
    boxes = torch.tensor([[2.0, 5.0, 20.0, 30.0, 1.0], [2.0, 5.0, 20.0, 30.0, 0.0]])
    flipped, straight = (_outline(replace(example, boxes=boxes), which) for which in (0, 1))
    assert (straight.left, straight.top, straight.width, straight.height) == (5, 2, 30, 20)
    assert (flipped.left, flipped.top, flipped.width, flipped.height) == (56 - 5 - 30, 2, 30, 20)


@pytest.mark.parametrize("count", [3, 60])
def test_confusions_fit_few_and_many_categories(run_folder: Path, count: int) -> None:
    from pretrain.report.accuracy import confusion

    names = tuple(f"thing {k}" for k in range(count))
    record = replace(read_record(run_folder, {}), evaluation=evaluation(names, (0, 40)))
    made = confusion(record)
    assert made is not None
    assert ("confusion matrix of 3 categories" in made.text) == (count == 3)
    assert ("Most frequent confusions" in made.text) == (count == 60)
