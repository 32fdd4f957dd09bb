"""Do the pictures show what they claim?"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from pretrain.visualize.chart import SIZES, Chart, Level, Line, draw, nice_ticks, smoothed
from pretrain.visualize.correspondence import landing_cells, patch_colours
from pretrain.visualize.dumbbell import Measure, Move, dumbbells
from pretrain.visualize.features import principal_rgb
from pretrain.visualize.markup import element
from pretrain.visualize.matrix import confusion_matrix
from pretrain.visualize.numbers import duration, magnitude, significant


def test_text_and_attributes_are_escaped() -> None:
    made = element("p", "<b>", ["&", None, 3], title='"x"', class_="a", data_x=None).text
    assert made == '<p title="&quot;x&quot;" class="a">&lt;b&gt;&amp;3</p>'


def test_patches_of_the_same_view_land_on_themselves() -> None:
    box = torch.tensor([3.0, 5.0, 40.0, 30.0, 1.0])
    cells = landing_cells(box, box, 96, 4)
    expected = torch.tensor([[x, y, 1.0, 1.0] for y in range(4) for x in range(4)])
    assert torch.allclose(cells, expected, atol=1e-5)


def test_patches_of_the_right_half_land_in_the_right_half() -> None:
    whole, right = torch.tensor([0.0, 0, 80, 80, 0]), torch.tensor([0.0, 40, 80, 40, 0])
    cells = landing_cells(whole, right, 80, 4)
    assert torch.allclose(cells[0], torch.tensor([2.0, 0.0, 0.5, 1.0]))
    assert torch.allclose(cells[-1], torch.tensor([3.5, 3.0, 0.5, 1.0]))


def test_patches_of_a_flipped_view_land_mirrored() -> None:
    # In the flipped image the target is the left quarter, hence the right quarter of the input's image.
    whole, flipped = torch.tensor([0.0, 0, 80, 80, 0]), torch.tensor([0.0, 0, 80, 20, 1])
    cells = landing_cells(whole, flipped, 80, 4)
    assert torch.allclose(cells[0], torch.tensor([3.75, 0.0, 0.25, 1.0]))
    assert torch.allclose(cells[3], torch.tensor([3.0, 0.0, 0.25, 1.0]))


def test_patch_colours_tell_the_corners_apart() -> None:
    colours = patch_colours(8)
    assert len(set(colours)) == 64
    corners = [tuple(map(int, re.findall(r"\d+", colours[k]))) for k in (0, 7, 56, 63)]
    distances = [math.dist(a, b) for i, a in enumerate(corners) for b in corners[:i]]
    assert min(distances) > 80


def test_principal_components_are_deterministic_and_find_the_largest_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 16, 8, generator=generator) * 0.01
    tokens[:, :8, 5] += 4.0  # upper half of each 4 x 4 grid
    pictures = principal_rgb(tokens)
    assert pictures.shape == (3, 4, 4, 3)
    assert (pictures[:, :2, :, 0] > 200).all() and (pictures[:, 2:, :, 0] < 60).all()
    assert np.array_equal(pictures, principal_rgb(tokens.clone()))


def test_principal_components_do_not_depend_on_the_order_of_images() -> None:
    tokens = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(1))
    difference = principal_rgb(tokens.flip(0))[::-1].astype(int) - principal_rgb(tokens)
    assert abs(difference).max() <= 1  # rounding


def test_tokens_without_a_square_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="square grids"):
        principal_rgb(torch.zeros(1, 5, 8))


def test_chart_draws_extremes_levels_and_gaps() -> None:
    line = Line("loss", "red", [1, 2, 3, 4, 5], [2.0, math.nan, 1.0, 0.5, 4.0])
    made = draw(Chart("loss", "nats", [line], [Level("chance", 3.0)])).text
    assert made.count("<polyline") == 1 and made.count("<circle") == 1  # the value before the gap is a dot
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', made)[1].split()]
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2, abs=0.1)
    assert points[2][1] < points[0][1] < points[1][1]  # 4 above 1 above 0.5; y points down
    assert "chance" in made and f'viewBox="0 0 {SIZES["narrow"][0]} {SIZES["narrow"][1]}"' in made


def test_long_series_keep_their_spikes() -> None:
    values = [1.0] * 50_000
    values[12_345] = 9.0
    made = draw(Chart("norm", "", [Line("", "red", range(50_000), values)])).text
    heights = [
        float(p.split(",")[1]) for points in re.findall(r'points="([^"]*)"', made) for p in points.split()
    ]
    assert len(made) < 40_000
    assert min(heights) == pytest.approx(12 + 0.06 / 1.12 * (SIZES["narrow"][1] - 44), abs=0.2)


def test_chart_without_finite_values_is_refused() -> None:
    with pytest.raises(ValueError, match="leave it out"):
        Chart("norm", "", [Line("", "red", [1, 2], [math.nan, math.inf])])
    with pytest.raises(ValueError, match="leave it out"):
        Chart("norm", "", [Line("", "red", [1, 2], [0.0, 0.0])], is_log=True)


def test_smoothing_keeps_straight_lines_to_their_ends() -> None:
    steps = np.arange(200.0)
    values = 5 - 0.01 * steps
    values[17] = math.nan
    assert np.allclose(smoothed(steps, values), 5 - 0.01 * steps)


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.03, 0.98) == pytest.approx([0.25, 0.5, 0.75])
    assert nice_ticks(1, 400) == [100, 200, 300, 400]


def test_dumbbell_places_accuracies_in_order() -> None:
    made = dumbbells([Move("knn", 0.05, Measure(0.1, (0.08, 0.12)), Measure(0.6, (0.55, 0.65)))]).text
    before, after = (
        float(re.search(rf'cx="([\d.]+)"[^>]*class="{name}"', made)[1]) for name in ("before", "after")
    )
    chance = float(re.search(r'<line x1="([\d.]+)"[^>]*class="chance"', made)[1])
    assert chance < before < after
    assert (after - before) / (before - chance) == pytest.approx(10.0, rel=0.01)


def test_confusion_matrix_names_every_mistake() -> None:
    made = confusion_matrix(np.array([[3, 1], [0, 4]]), ["cat", "boat"]).text
    assert "cat taken for boat: 1 (25" in made
    assert "7 of 8 held-out images on the diagonal" in made


def test_numbers_read_well() -> None:
    assert [significant(v) for v in (0.041666, 12.0, 84000, 4.2e-7, 0)] == [
        "0.0417",
        "12",
        "84,000",
        "4.20e-07",
        "0",
    ]
    assert duration(380).replace("\u00a0", " ") == "6 min 20 s"
    assert magnitude(1.09e9) == "1.09 billion"
