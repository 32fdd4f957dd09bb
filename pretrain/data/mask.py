"""Which patches of an input are hidden: show the second image of a pair, or nothing?"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import torch
from jaxtyping import Bool
from torch import Tensor

from pretrain.config import Mask

TRIES = 10  # placements tried for one block before the mask counts as full


def num_hidden(grid: int, ratio: float) -> int:
    """Number of patches of a grid x grid mask that are True: `ratio` of them, at least 1, never all."""
    return min(max(round(ratio * grid * grid), 1), grid * grid - 1)


def draw_mask(grid: int, mask: Mask, generator: Random) -> Bool[Tensor, "g g"]:
    """A mask of the run's shape with exactly the run's share of True patches."""
    return SHAPES[mask.shape](grid, num_hidden(grid, mask.ratio), mask, generator)


def scattered_mask(grid: int, num: int, generator: Random) -> Bool[Tensor, "g g"]:
    """A grid x grid mask with exactly `num` True patches, every such mask equally likely.

    Raises ValueError when `num` does not fit in the grid. Source: SimMIM (arXiv 2111.09886), section 3.2.
    """
    _check_num(grid, num)
    # By random() alone, of which alone Python promises the same numbers in every version.
    order = sorted(range(grid * grid), key=lambda _: generator.random())
    mask = torch.zeros(grid * grid, dtype=torch.bool)
    mask[order[:num]] = True
    return mask.view(grid, grid)


def block_mask(grid: int, num: int, min_block: int, aspect: float, generator: Random) -> Bool[Tensor, "g g"]:
    """A grid x grid mask with exactly `num` True patches, made of rectangles.

    A rectangle covers at least about `min_block` patches while that many are still wanted; its height / width
    is log-uniform in [aspect, 1 / aspect]. What rectangles cannot fill exactly is topped up next to them.
    Raises ValueError when `num` does not fit in the grid. Source: BEiT (arXiv 2106.08254), algorithm 1.
    """
    _check_num(grid, num)
    mask = [[False] * grid for _ in range(grid)]
    missing = num
    while missing > 0 and (block := _new_block(mask, missing, min_block, aspect, generator)):
        for y, x in block:
            mask[y][x] = True
        missing -= len(block)
    for _ in range(missing):
        y, x = _border_patch(mask, generator)
        mask[y][x] = True
    return torch.tensor(mask)


SHAPES: dict[str, Callable[[int, int, Mask, Random], Bool[Tensor, "g g"]]] = {
    "blocks": lambda grid, num, mask, generator: block_mask(
        grid, num, mask.min_block, mask.aspect, generator
    ),
    "scattered": lambda grid, num, mask, generator: scattered_mask(grid, num, generator),
}


def _check_num(grid: int, num: int) -> None:
    if not 0 <= num <= grid * grid:
        raise ValueError(f"num={num} must lie in [0, {grid * grid}], the patches of a {grid} x {grid} mask")


def _new_block(
    mask: list[list[bool]], budget: int, min_block: int, aspect: float, generator: Random
) -> list[tuple[int, int]]:
    """The patches that the next rectangle adds, 1 to `budget` of them; empty when no try fits."""
    grid = len(mask)
    for _ in range(TRIES):
        area = generator.uniform(min(min_block, budget), budget)
        ratio = math.exp(generator.uniform(math.log(aspect), -math.log(aspect)))
        height, width = max(round(math.sqrt(area * ratio)), 1), max(round(math.sqrt(area / ratio)), 1)
        if height >= grid or width >= grid:
            continue
        top = int(generator.random() * (grid - height + 1))
        left = int(generator.random() * (grid - width + 1))
        rectangle = ((y, x) for y in range(top, top + height) for x in range(left, left + width))
        added = [(y, x) for y, x in rectangle if not mask[y][x]]
        if 1 <= len(added) <= budget:
            return added
    return []


def _border_patch(mask: list[list[bool]], generator: Random) -> tuple[int, int]:
    """A random False patch that touches a True one by a side; any patch while the mask is empty."""
    grid = len(mask)
    free = [(y, x) for y in range(grid) for x in range(grid) if not mask[y][x]]
    neighbours = ((-1, 0), (1, 0), (0, -1), (0, 1))
    border = [
        (y, x)
        for y, x in free
        if any(0 <= y + dy < grid and 0 <= x + dx < grid and mask[y + dy][x + dx] for dy, dx in neighbours)
    ]
    choices = border or free
    return choices[int(generator.random() * len(choices))]
