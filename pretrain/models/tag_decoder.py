"""Which tags does an image have? A Transformer whose queries are the tags, decoded in chunks."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import Tags
from pretrain.models.decoder import grid_positions, init_xavier

# Keys and values of one layer, each [n, heads, l, width / heads].
KeysValues = tuple[Tensor, Tensor]


class TagDecoder(nn.Module):
    """Tokens [n, l, d] to one logit a tag and one similarity a tag.

    Every tag has a learned query, its label embedding Q0, that reads the image through `tags.layers` of
    cross-attention and FFN, post-norm, without dropout. Queries do not see each other, so `tags.chunk` of them
    are decoded at once, exactly; the backward pass computes each chunk again and never holds the states of
    all tags. Keys and values are computed once for all chunks.

    Source: Query2Label (arXiv 2107.10834), whose published layers have no self-attention either; the
    similarities are those of HVP-MTL (arXiv 2310.07510), momentum distillation.
    """

    def __init__(self, tags: Tags, token_width: int, num_tags: int) -> None:
        super().__init__()
        self.chunk = tags.chunk
        self.embed = nn.Linear(token_width, tags.width)
        self.layers = nn.ModuleList(
            CrossAttentionLayer(tags.width, tags.ffn, tags.heads) for _ in range(tags.layers)
        )
        self.queries = nn.Parameter(torch.empty(num_tags, tags.width))
        self.weight = nn.Parameter(torch.empty(num_tags, tags.width))
        self.bias = nn.Parameter(torch.empty(num_tags))
        self.apply(init_xavier)
        bound = tags.width**-0.5
        nn.init.normal_(self.queries)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, tokens: Float[Tensor, "n l d"], owned: Bool[Tensor, "n l"] | None, grid: int
    ) -> tuple[Float32[Tensor, "n k"], Float32[Tensor, "n k"]]:
        """Logits <W_k, h_k> + b_k and similarities <Q0_k, g>, where h_k is the last state of query k and g the
        mean of all h_k.

        `tokens` are a grid of `grid` x `grid` in row order; only those with `owned` are seen, one a row at
        least (None: all of them). Products that end in a logit or similarity, and g, are summed in float32.
        """
        memory = self.embed(tokens)
        positions = grid_positions(grid, memory.shape[-1], memory.device).to(memory.dtype)
        read = [layer.keys_values(memory, positions) for layer in self.layers]
        visible = None if owned is None else owned[:, None, None, :]
        decode = partial(self._decode, read, visible)
        if torch.is_grad_enabled():
            # Nothing is drawn at random, so there is no state of a generator to keep.
            decode = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False)
        # Each parameter is split once: its gradient is put together once, however many chunks there are.
        parts = zip(*(p.split(self.chunk) for p in (self.queries, self.weight, self.bias)), strict=True)
        logits, sums = zip(*(decode(*part) for part in parts), strict=True)
        embedding = torch.stack(sums).sum(0) / len(self.queries)
        return torch.cat(logits, dim=1), embedding @ self.queries.float().T

    def _decode(
        self,
        read: list[KeysValues],
        visible: Bool[Tensor, "n 1 1 l"] | None,
        labels: Float[Tensor, "c width"],
        weight: Float[Tensor, "c width"],
        bias: Float[Tensor, " c"],
    ) -> tuple[Float32[Tensor, "n c"], Float32[Tensor, "n width"]]:
        """Logits of a chunk of tags, and the sum of their last states."""
        state = torch.zeros_like(labels)[None]
        for layer, keys_values in zip(self.layers, read, strict=True):
            state = layer(state, labels, keys_values, visible)
        state = state.float()
        return (state * weight.float()).sum(-1) + bias.float(), state.sum(1)


class CrossAttentionLayer(nn.Module):
    """One post-norm layer: every state reads the image, then an FFN with ReLU.

    The first layer's states are one row for all images: only what it reads tells them apart.
    """

    def __init__(self, width: int, ffn: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # a softmax does not see what shifts every key
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, ffn)
        self.relu = nn.ReLU()
        self.contract = nn.Linear(ffn, width)
        self.ffn_norm = nn.LayerNorm(width)

    def keys_values(
        self, memory: Float[Tensor, "n l width"], positions: Float[Tensor, "l width"]
    ) -> KeysValues:
        """What queries compare themselves with, content and place, and what they read: content alone."""
        return self._heads(self.key(memory + positions)), self._heads(self.value(memory))

    def forward(
        self,
        state: Float[Tensor, "m c width"],
        labels: Float[Tensor, "c width"],
        keys_values: KeysValues,
        visible: Bool[Tensor, "n 1 1 l"] | None,
    ) -> Float[Tensor, "n c width"]:
        """New states of n images; m is n, or 1 where the states are equal for all of them."""
        keys, values = keys_values
        queries = self._heads(self.query(state + labels)).expand(len(keys), -1, -1, -1)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible)
        state = self.attention_norm(state + self.out(attended.transpose(1, 2).flatten(2)))
        return self.ffn_norm(state + self.contract(self.relu(self.expand(state))))

    def _heads(self, features: Float[Tensor, "m c width"]) -> Float[Tensor, "m heads c part"]:
        return features.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
