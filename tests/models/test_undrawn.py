"""Is nothing drawn for weights that are read, and all drawn as before afterwards?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.models.pooling import init_linear_and_norm
from pretrain.models.undrawn import undrawn


def test_building_draws_nothing_within_and_the_same_afterwards() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(4, 3).weight.detach().clone()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), undrawn():
        module = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(3, 8, 3), nn.LayerNorm(8)).apply(
            init_linear_and_norm
        )
        assert module[2].weight.eq(1).all() and module[0].bias.eq(0).all()  # constants are no draws
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(nn.Linear(4, 3).weight, expected)
