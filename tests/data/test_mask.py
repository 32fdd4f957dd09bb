"""Does a mask hold exactly what the input promises, in blocks or scattered?"""

from __future__ import annotations

from random import Random

import pytest
import torch

from pretrain.config import Mask
from pretrain.data.mask import block_mask, draw_mask, num_hidden, scattered_mask

GRIDS = [(4, 4), (6, 4), (12, 16), (14, 16)]  # side of the grid, smallest block


def equal_neighbours(mask: torch.Tensor) -> float:
    """Share of side-by-side patches that have the same value: 0.5 for a random half, near 1 for blocks."""
    down = (mask[1:] == mask[:-1]).float().mean()
    right = (mask[:, 1:] == mask[:, :-1]).float().mean()
    return float(down + right) / 2


@pytest.mark.parametrize(("grid", "min_block"), GRIDS)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_mask_holds_exactly_the_wanted_count(grid: int, min_block: int, ratio: float) -> None:
    wanted = num_hidden(grid, ratio)
    for seed in range(200):
        mask = block_mask(grid, wanted, min_block, 0.3, Random(seed))
        assert mask.shape == (grid, grid)
        assert int(mask.sum()) == wanted


@pytest.mark.parametrize(("grid", "min_block"), GRIDS)
def test_mask_is_made_of_blocks(grid: int, min_block: int) -> None:
    wanted = num_hidden(grid, 0.5)
    share = sum(
        equal_neighbours(block_mask(grid, wanted, min_block, 0.3, Random(seed))) for seed in range(100)
    )
    # scattered patches give (n/2 - 1) / (n - 1) = 0.47 to 0.5; blocks measured 0.72 to 0.86
    assert share / 100 > 0.65


def test_every_patch_is_hidden_in_some_masks_and_shown_in_some() -> None:
    masks = torch.stack([block_mask(14, 98, 16, 0.3, Random(seed)) for seed in range(600)]).float().mean(0)
    # rectangles that lie inside the grid reach corners seldom, as BEiT: 0.06 (corner) to 0.8 (middle)
    assert float(masks.min()) > 0.02 and float(masks.max()) < 0.9
    assert float((masks - masks.flip(1)).abs().max()) < 0.1  # no side is preferred


def test_masks_differ_between_generators_and_repeat_for_one() -> None:
    masks = [block_mask(14, 98, 16, 0.3, Random(seed)) for seed in range(20)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 20
    assert torch.equal(masks[3], block_mask(14, 98, 16, 0.3, Random(3)))


def test_a_count_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num=17 must lie in \[0, 16\]"):
        block_mask(4, 17, 4, 0.3, Random(0))
    with pytest.raises(ValueError, match=r"num=-1 must lie in \[0, 16\]"):
        scattered_mask(4, -1, Random(0))


@pytest.mark.parametrize(("grid", "num"), [(2, 0), (2, 4), (6, 22), (14, 118)])
def test_scattered_mask_holds_exactly_the_wanted_count(grid: int, num: int) -> None:
    for seed in range(50):
        mask = scattered_mask(grid, num, Random(seed))
        assert mask.shape == (grid, grid) and mask.dtype == torch.bool and int(mask.sum()) == num


def test_scattered_masks_hide_every_patch_and_every_pair_of_patches_equally_often() -> None:
    masks = torch.stack([scattered_mask(4, 6, Random(seed)) for seed in range(4000)]).flatten(1).float()
    together = masks.T @ masks / len(masks)
    single, pair = 6 / 16, 6 / 16 * 5 / 15
    # five standard deviations of a share of 4,000 draws
    assert float((together.diagonal() - single).abs().max()) < 5 * (single * (1 - single) / 4000) ** 0.5
    apart = together[~torch.eye(16, dtype=torch.bool)]
    assert float((apart - pair).abs().max()) < 5 * (pair * (1 - pair) / 4000) ** 0.5


def test_the_shape_of_a_run_decides_which_mask_is_drawn() -> None:
    blocks = draw_mask(12, Mask(shape="blocks", min_block=9, aspect=0.5), Random(1))
    scattered = draw_mask(12, Mask(shape="scattered", ratio=0.25), Random(1))
    assert torch.equal(blocks, block_mask(12, 72, 9, 0.5, Random(1)))
    assert torch.equal(scattered, scattered_mask(12, 36, Random(1)))
