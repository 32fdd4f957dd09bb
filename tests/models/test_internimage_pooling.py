"""Does pooling see exactly the tokens that an image owns?"""

from __future__ import annotations

import pytest
import torch

from pretrain.models.pooling import AttentionPool, MeanPool, mean_token


def pool() -> AttentionPool:
    torch.manual_seed(0)
    module = AttentionPool(width=32, out_width=12, num_heads=4)
    with torch.no_grad():
        for parameter in module.parameters():  # weights that matter, biases that are not zero
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def test_owned_tokens_pool_like_the_subset_alone():
    module, tokens = pool(), torch.randn(3, 10, 32)
    owned = torch.stack([torch.randperm(10) < 4 for _ in range(3)])
    together = module(tokens, owned)
    alone = torch.cat([module(row[mine][None]) for row, mine in zip(tokens, owned, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_tokens_of_the_other_image_have_no_influence_and_no_gradient():
    module, tokens = pool(), torch.randn(2, 6, 32, requires_grad=True)
    owned = torch.tensor([[True, False, True, True, False, False]] * 2)
    module(tokens, owned).square().sum().backward()
    assert not tokens.grad[~owned].any() and tokens.grad[owned].abs().sum(-1).all()


def test_owning_all_tokens_equals_no_mask():
    module, tokens = pool(), torch.randn(2, 6, 32)
    torch.testing.assert_close(module(tokens, torch.ones(2, 6, dtype=torch.bool)), module(tokens))


def test_mean_pool_projects_the_mean_of_owned_tokens():
    module, tokens = MeanPool(width=8, out_width=3), torch.randn(2, 6, 8)
    owned = torch.tensor([[True, False, True, True, False, False]] * 2)
    by_hand = tokens[:, [0, 2, 3]].sum(1) / 3 @ module.proj.weight.T + module.proj.bias
    torch.testing.assert_close(module(tokens, owned), by_hand)


def test_mean_token_by_hand():
    tokens = torch.tensor([[[1.0], [2.0], [6.0]]])
    assert mean_token(tokens).item() == 3
    assert mean_token(tokens, torch.tensor([[True, False, True]])).item() == 3.5


def test_width_must_be_a_multiple_of_heads():
    with pytest.raises(ValueError, match="multiple of num_heads=5"):
        AttentionPool(width=32, num_heads=5)
