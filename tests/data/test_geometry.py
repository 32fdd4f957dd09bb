"""Do the target's patches lie where the formula says, in every combination of flips?"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from pretrain.config import Views
from pretrain.data.geometry import relative_positions
from pretrain.data.views import cut, draw_crop
from tests.data.sets import two_views

SIZE, GRID = 64, 4  # pixels, patches
PLAIN = Views(size=SIZE, jitter_probability=0.0, grayscale=0.0, blur=(0.0, 0.0), solarize=(0.0, 0.0))


def coordinates_as_colours(height: int, width: int) -> torch.Tensor:
    """An image whose red is the row of the pixel and whose green its column, in pixels."""
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    image[..., 0] = torch.arange(height)[:, None]
    image[..., 1] = torch.arange(width)
    return image


def colour_at(view: torch.Tensor, y: float, x: float) -> tuple[float, float]:
    """Row and column of the whole image that `view` shows at a place in patches from the first centre."""
    patch = SIZE / GRID
    place = torch.tensor([[(x + 0.5) * patch / SIZE * 2 - 1, (y + 0.5) * patch / SIZE * 2 - 1]])
    sampled = torch.nn.functional.grid_sample(
        view[None].float(), place.view(1, 1, 1, 2), mode="bilinear", align_corners=False
    )
    return float(sampled[0, 0]), float(sampled[0, 1])


@pytest.mark.parametrize("flips", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_target_patches_show_the_same_point_of_the_image_in_both_views(flips: tuple[int, int]) -> None:
    generator = Random(str(flips))
    compared = 0
    for _ in range(40):
        height, width = generator.randint(100, 250), generator.randint(100, 250)
        image = coordinates_as_colours(height, width)
        boxes = [draw_crop(height, width, (0.2, 1.0), (3 / 4, 4 / 3), generator) for _ in range(2)]
        views = [cut(image, box, bool(flip), SIZE) for box, flip in zip(boxes, flips, strict=True)]
        rows = [
            torch.tensor([[*box, flip]], dtype=torch.float32) for box, flip in zip(boxes, flips, strict=True)
        ]
        found = relative_positions(rows[0], rows[1], torch.tensor([float(width)]), GRID)[0]
        for patch, (y, x, _, _) in enumerate(found.tolist()):
            if not (0 <= y <= GRID - 1 and 0 <= x <= GRID - 1):
                continue  # outside of the input view: nothing to compare
            truth = colour_at(views[1], patch // GRID, patch % GRID)
            claim = colour_at(views[0], y, x)
            # levels are whole and resizing rounds twice: 1.5 pixels of at least 100
            assert abs(truth[0] - claim[0]) < 1.5 and abs(truth[1] - claim[1]) < 1.5, (boxes, flips, patch)
            compared += 1
    assert compared > 100


def test_two_views_report_boxes_that_fit_the_formula() -> None:
    settings = replace(PLAIN, flip=0.5)
    compared, mirrored = 0, 0
    for seed in range(60):
        generator = Random(seed)
        height, width = generator.randint(100, 250), generator.randint(100, 250)
        views, boxes = two_views(coordinates_as_colours(height, width), settings, generator)
        found = relative_positions(boxes[:1], boxes[1:], torch.tensor([float(width)]), GRID)[0]
        mirrored += int(boxes[0, 4] != boxes[1, 4])
        for patch, (y, x, _, _) in enumerate(found.tolist()):
            if 0 <= y <= GRID - 1 and 0 <= x <= GRID - 1:
                truth, claim = colour_at(views[1], patch // GRID, patch % GRID), colour_at(views[0], y, x)
                assert abs(truth[0] - claim[0]) < 1.5 and abs(truth[1] - claim[1]) < 1.5
                compared += 1
    assert compared > 200 and 15 < mirrored < 45


def test_the_same_view_is_the_plain_grid() -> None:
    box = torch.tensor([[3.0, 5.0, 40.0, 60.0, 1.0]])
    found = relative_positions(box, box, torch.tensor([100.0]), 3)[0]
    y, x = torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij")
    zeros = torch.zeros(9)
    torch.testing.assert_close(found, torch.stack([y.flatten(), x.flatten(), zeros, zeros], dim=1))


def test_a_case_by_hand() -> None:
    # input: left half of a 100 px square; target: the square mirrored. Patch (0, 0) of the target shows the
    # square's top right quarter: in input patches (50 x 25 px) its centre, row 25, column 75, is 0.5, 3 - 0.5.
    entire = torch.tensor([[0.0, 0.0, 100.0, 100.0, 1.0]])
    left = torch.tensor([[0.0, 0.0, 100.0, 50.0, 0.0]])
    found = relative_positions(left, entire, torch.tensor([100.0]), 2)[0]
    ln2 = float(torch.tensor(2.0).log())
    expected = torch.tensor([[0, 2.5, 0, ln2], [0, 0.5, 0, ln2], [1, 2.5, 0, ln2], [1, 0.5, 0, ln2]])
    torch.testing.assert_close(found, expected)
