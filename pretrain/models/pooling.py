"""How do the tokens of an image become its one global vector?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class AttentionPool(nn.Module):
    """Global vector of an image: its mean token attends to its tokens, then a linear projection.

    tokens [b, l, width] -> [b, out_width], in the dtype of the parameters. The query, keys and values have
    LayerNorms (eps 1e-6) and biases of their own. `owned` [b, l] names the tokens that belong to the image;
    the others are seen neither by the query nor by the attention. At least one token of a row must be owned.
    The softmax runs in float32 inside scaled_dot_product_attention.

    Source: M3I (arXiv 2211.09807), Table 7 (in 1024, out 768, 16 heads); module names are those of the
    published InternImage-H and G checkpoints (`clip_projector.*`).
    """

    def __init__(self, width: int = 1024, out_width: int = 768, num_heads: int = 16):
        super().__init__()
        self.norm1_q = nn.Sequential(nn.LayerNorm(width, eps=1e-6))
        self.norm1_k = nn.Sequential(nn.LayerNorm(width, eps=1e-6))
        self.norm1_v = nn.Sequential(nn.LayerNorm(width, eps=1e-6))
        self.cross_dcn = CrossAttention(width, out_width, num_heads)
        self.apply(init_linear_and_norm)

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the vector."""
        return self.cross_dcn.proj

    def forward(
        self, tokens: Float[Tensor, "b l d"], owned: Bool[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b e"]:
        query = mean_token(tokens, owned)[:, None]
        pooled = self.cross_dcn(self.norm1_q(query), self.norm1_k(tokens), self.norm1_v(tokens), owned)
        return pooled[:, 0]


class MeanPool(nn.Module):
    """Global vector of an image: its mean token, then a linear projection; otherwise as `AttentionPool`."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(width, out_width)
        self.apply(init_linear_and_norm)

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the vector."""
        return self.proj

    def forward(
        self, tokens: Float[Tensor, "b l d"], owned: Bool[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b e"]:
        return self.proj(mean_token(tokens, owned))


class CrossAttention(nn.Module):
    """Multi-head attention of queries [b, m, width] to keys and values [b, l, width] -> [b, m, out_width].

    Only keys with `owned` are seen. The biases of q, k and v are parameters of this module, not of its Linear
    layers, as in the published checkpoints.
    """

    def __init__(self, width: int, out_width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"attention width={width} must be a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, out_width)

    def reset_parameters(self) -> None:
        for bias in (self.q_bias, self.k_bias, self.v_bias):
            nn.init.zeros_(bias)

    def forward(
        self,
        query: Float[Tensor, "b m d"],
        key: Float[Tensor, "b l d"],
        value: Float[Tensor, "b l d"],
        owned: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b m e"]:
        q = self._heads(self.q(query) + self.q_bias)
        k = self._heads(self.k(key) + self.k_bias)
        v = self._heads(self.v(value) + self.v_bias)
        visible = None if owned is None else owned[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, features: Float[Tensor, "b l d"]) -> Float[Tensor, "b h l k"]:
        return features.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def mean_token(
    tokens: Float[Tensor, "b l d"], owned: Bool[Tensor, "b l"] | None = None
) -> Float[Tensor, "b d"]:
    """Mean over the tokens that an image owns (all of them when `owned` is None)."""
    if owned is None:
        return tokens.mean(1)
    return (tokens * owned[..., None]).sum(1) / owned.sum(1, keepdim=True).to(tokens.dtype)


def prepend_mean(tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b n d"]:
    """The tokens [b, 1 + l, d] with their mean as the first: the summary where there is no class token."""
    return torch.cat([mean_token(tokens)[:, None], tokens], dim=1)


def init_linear_and_norm(module: nn.Module) -> None:
    """Published initialisation of one module's own parameters, for `nn.Module.apply`.

    Linear: truncated normal of std 0.02, zero bias. LayerNorm: one, zero. Any other module with
    `reset_parameters` (convolutions, BatchNorm, ours): that method. Touches no child's parameters, so
    `apply` gathers what it needs when parameters are partitioned at construction (ZeRO-3).
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()
