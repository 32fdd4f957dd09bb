"""Is an image refused before it takes too much memory, and otherwise only looked at?"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from pretrain.initial.one_image import MOST_BYTES, TooLargeImage, try_image


def test_what_an_image_gives_is_what_the_tower_gives() -> None:
    tower = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Flatten(2), nn.GELU()).eval()
    assert torch.equal(try_image(tower, 32, "it"), tower(torch.zeros(1, 3, 32, 32)))


def test_what_is_freed_or_shared_takes_no_room() -> None:
    block = MOST_BYTES // 8

    def passing(images: Tensor) -> Tensor:
        for _ in range(12):
            found = torch.empty(block, dtype=torch.uint8).view(2, -1).T.expand(5, -1, -1)
        assert float(images.sum()) == 0 and images.bool().any().item() is False
        return found[0, :3]

    assert try_image(passing, 32, "it").shape == (3, 2)


@pytest.mark.parametrize("at_once", [True, False])
def test_an_operation_that_would_take_too_much_does_not_run(at_once: bool) -> None:
    reached = []

    def greedy(images: Tensor) -> Tensor:
        if at_once:
            return images.new_empty(2**40)
        while True:
            reached.append(torch.empty(MOST_BYTES // 8, dtype=torch.uint8))

    told = re.escape(
        "it takes more than 4 GiB of memory for one image of 32 pixels a side: give smaller images"
    )
    with pytest.raises(TooLargeImage, match=told):
        try_image(greedy, 32, "it")
    assert len(reached) == (0 if at_once else 7)  # and the image
