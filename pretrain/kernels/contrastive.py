"""How much does each prediction know of its target among those of all ranks? Exact InfoNCE in row chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretrain.collectives import gather_rows, rank, world_size
from pretrain.kernels.splitmix import splitmix64

LOGITS = 2**24  # that live at once, in whole rows: 64 MB in float32, of which a step holds three


def contrastive_nats(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "n d"],
    has_text: Bool[Tensor, " n"],
    scale: Float[Tensor, ""],
    text_ids: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """Symmetric InfoNCE over the pairs of the global batch that have a text; and of each own pair, without gradient.

    `images` and `texts` are unit vectors in float32, `scale` is the inverse temperature. Equal `text_ids` mark
    equal texts ("a photo of a dog" of two dogs): they are no negatives of each other's image; None: all differ.
    The mean of the first over ranks is the loss in nats, and so are the gradients after averaging; 0 if no rank
    has a text.
    Gradients are exact: each rank forms its own rows of both logit matrices from gathered features and
    gathered log-sum-exps, so no gradient of a gathered feature travels. Source: CLIP, arXiv 2103.00020.
    """
    if text_ids is None:
        text_ids = torch.arange(len(texts), device=texts.device) + rank() * len(texts)
    return _Contrastive.apply(images, texts, has_text, scale, text_ids)


def text_ids(tokens: Int[Tensor, "n length"]) -> Int[Tensor, " n"]:
    """A number a text, int64: equal for equal tokens, and for others with probability 2^-64 a pair.

    The sum, modulo 2^64, of one pseudo-random number for every token at every place (Zobrist's hashing); computed
    where the tokens lie.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device) << 32  # more than there are tokens
    return splitmix64(tokens.long() + places).sum(dim=1)


def matching_nats(
    predictions: Float[Tensor, "n d"], targets: Float[Tensor, "n d"], scale: float
) -> Float[Tensor, " n"]:
    """-log of the softmax over the targets of the global batch that each prediction gives to its own.

    Unit vectors in float32; gradients reach the predictions alone, so targets may come from a teacher. Chance
    is ln(world n). Exact, in row chunks. Source: one direction of MoCo v3 (arXiv 2104.02057), algorithm 1,
    without its factor 2 tau.
    """
    return _Matching.apply(predictions, targets.detach(), scale)


class _Matching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, predictions: Tensor, targets: Tensor, scale: float) -> Tensor:
        candidates = gather_rows(targets)
        parts = _parts(len(predictions), len(candidates))
        rows = torch.cat([(scale * predictions[part] @ candidates.T).logsumexp(dim=1) for part in parts])
        ctx.save_for_backward(predictions, targets, candidates, rows)
        ctx.scale = scale
        return rows - scale * (predictions * targets).sum(dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        predictions, targets, candidates, rows = ctx.saved_tensors
        gradient = torch.empty_like(predictions)
        for part in _parts(len(predictions), len(candidates)):
            weight = (ctx.scale * predictions[part] @ candidates.T).sub_(rows[part, None]).exp_()
            gradient[part] = weight @ candidates - targets[part]
        return gradient * (grad * ctx.scale)[:, None], None, None


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, images: Tensor, texts: Tensor, has_text: Tensor, scale: Tensor, text_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        all_images, all_texts = gather_rows(images), gather_rows(texts)
        pairs = _Pairs(gather_rows(has_text), gather_rows(text_ids), rank() * len(images))
        rows = _log_sum_exp(images, all_texts, pairs, scale)
        columns = _log_sum_exp(texts, all_images, pairs, scale)
        positive = scale * (images * texts).sum(dim=1)
        count = pairs.valid.sum().clamp(min=1)
        each = torch.where(has_text, rows + columns - 2 * positive, 0) / 2
        ctx.pairs = pairs
        ctx.save_for_backward(
            images, texts, scale, all_images, all_texts, gather_rows(rows), gather_rows(columns), count
        )
        ctx.mark_non_differentiable(each)
        return each.sum() * world_size() / count, each

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, Tensor, None]:
        images, texts, scale, all_images, all_texts, rows, columns, count = ctx.saved_tensors
        # The mean over ranks of (world x own) is the sum, but the derivative of every rank's term by OUR
        # features is formed here, with no second hop: hence the same factor `world / count`.
        factor = grad * world_size() / (2 * count)
        grad_images, scale_images = _row_gradient(images, all_texts, rows, columns, ctx.pairs, scale)
        grad_texts, scale_texts = _row_gradient(texts, all_images, columns, rows, ctx.pairs, scale)
        # Each logit s_ij is met once as image row i and once as text row j; the scale must count it once.
        grad_scale = factor * (scale_images + scale_texts) / 2
        return factor * grad_images, factor * grad_texts, None, grad_scale, None


@dataclass(frozen=True)
class _Pairs:
    """Which pairs of the global batch meet in the softmaxes."""

    valid: Bool[Tensor, " g"]  # of the global batch: has a text
    ids: Int[Tensor, " g"]  # equal for equal texts
    first: int  # place of this rank's first pair

    def are_apart(self, own: Int[Tensor, " p"]) -> Bool[Tensor, "p g"]:
        """For some of the global batch: is each other one a candidate, itself included?"""
        apart = self.ids[own, None] != self.ids[None, :]
        apart[torch.arange(len(own), device=own.device), own] = True
        return apart.logical_and_(self.valid)


def _log_sum_exp(own: Tensor, others: Tensor, pairs: _Pairs, scale: Tensor) -> Tensor:
    """log of the sum over `others` that are candidates of exp(scale own.other), [n]; 0 where there is none."""
    out = []
    for part in _parts(len(own), len(others)):
        mine = _places(part, own, pairs.first)
        logits = scale * own[part] @ others.T
        out.append(logits.masked_fill_(~pairs.are_apart(mine), -torch.inf).logsumexp(dim=1))
    sums = torch.cat(out)
    return sums.masked_fill(sums == -torch.inf, 0.0)


def _row_gradient(
    own: Tensor, others: Tensor, rows: Tensor, columns: Tensor, pairs: _Pairs, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivative of the sum over both softmaxes by `own`, [n, d], and by the scale, scalar."""
    gradient, by_scale = torch.empty_like(own), scale.new_zeros(())
    for part in _parts(len(own), len(others)):
        mine = _places(part, own, pairs.first)
        cosine = own[part] @ others.T
        logits = scale * cosine
        weight = torch.exp(logits - rows[mine, None])
        weight += logits.sub_(columns[None, :]).exp_()
        weight[torch.arange(len(mine), device=own.device), mine] -= 2
        weight.masked_fill_(~pairs.are_apart(mine).logical_and_(pairs.valid[mine, None]), 0)
        gradient[part] = scale * (weight @ others)
        by_scale = by_scale + cosine.flatten() @ weight.flatten()
    return gradient, by_scale


def _places(part: slice, own: Tensor, first: int) -> Int[Tensor, " p"]:
    """Where some of this rank's rows stand in the global batch."""
    return torch.arange(first + part.start, first + min(part.stop, len(own)), device=own.device)


def _parts(rows: int, columns: int) -> list[slice]:
    """Runs of rows of a logit matrix with at most LOGITS numbers each, but a row at least."""
    step = max(1, LOGITS // max(columns, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]
