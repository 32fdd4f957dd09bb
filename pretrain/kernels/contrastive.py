"""How much does each prediction know of its target among those of all ranks? Exact InfoNCE in row chunks."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pretrain.collectives import gather_rows, rank, world_size

LOGITS = 2**24  # that live at once, in whole rows: 64 MB in float32, of which a step holds three


def contrastive_nats(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "n d"],
    has_text: Bool[Tensor, " n"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE over the pairs of the global batch that have a text.

    `images` and `texts` are unit vectors in float32, `scale` is the inverse temperature. The mean of the
    result over ranks is the loss in nats, and so are the gradients after averaging; 0 if no rank has a text.
    Gradients are exact: each rank forms its own rows of both logit matrices from gathered features and
    gathered log-sum-exps, so no gradient of a gathered feature travels. Source: CLIP, arXiv 2103.00020.
    """
    return _Contrastive.apply(images, texts, has_text, scale)


def matching_nats(
    predictions: Float[Tensor, "n d"], targets: Float[Tensor, "n d"], scale: float
) -> Float[Tensor, ""]:
    """-log of the softmax over the targets of the global batch that each prediction gives to its own.

    Unit vectors in float32; gradients reach the predictions alone, so targets may come from a teacher. The
    mean of the result over ranks is the loss, and so are the gradients; chance is ln(world n). Exact, in row
    chunks. Source: one direction of MoCo v3 (arXiv 2104.02057), algorithm 1, without its factor 2 tau.
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
        return (rows - scale * (predictions * targets).sum(dim=1)).mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        predictions, targets, candidates, rows = ctx.saved_tensors
        gradient = torch.empty_like(predictions)
        for part in _parts(len(predictions), len(candidates)):
            weight = (ctx.scale * predictions[part] @ candidates.T).sub_(rows[part, None]).exp_()
            gradient[part] = weight @ candidates - targets[part]
        return gradient * (grad * ctx.scale / len(predictions)), None, None


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, texts: Tensor, has_text: Tensor, scale: Tensor) -> Tensor:
        all_images, all_texts = gather_rows(images), gather_rows(texts)
        valid = gather_rows(has_text)
        rows = _log_sum_exp(images, all_texts, valid, scale)
        columns = _log_sum_exp(texts, all_images, valid, scale)
        positive = scale * (images * texts).sum(dim=1)
        count = valid.sum().clamp(min=1)
        own = torch.where(has_text, rows + columns - 2 * positive, 0).sum() / 2
        ctx.save_for_backward(
            images, texts, scale, all_images, all_texts, gather_rows(rows), gather_rows(columns), valid, count
        )
        return own * world_size() / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        images, texts, scale, all_images, all_texts, rows, columns, valid, count = ctx.saved_tensors
        first = rank() * len(images)
        # The mean over ranks of (world x own) is the sum, but the derivative of every rank's term by OUR
        # features is formed here, with no second hop: hence the same factor `world / count`.
        factor = grad * world_size() / (2 * count)
        grad_images, scale_images = _row_gradient(images, all_texts, rows, columns, valid, scale, first)
        grad_texts, scale_texts = _row_gradient(texts, all_images, columns, rows, valid, scale, first)
        # Each logit s_ij is met once as image row i and once as text row j; the scale must count it once.
        grad_scale = factor * (scale_images + scale_texts) / 2
        return factor * grad_images, factor * grad_texts, None, grad_scale


def _log_sum_exp(own: Tensor, others: Tensor, valid: Tensor, scale: Tensor) -> Tensor:
    """log of the sum over valid `others` of exp(scale own.other), [n]; 0 where nothing is valid."""
    out = [
        (scale * own[part] @ others.T).masked_fill_(~valid, -torch.inf).logsumexp(dim=1)
        for part in _parts(len(own), len(others))
    ]
    return torch.cat(out).masked_fill(~valid.any(), 0.0)


def _row_gradient(
    own: Tensor, others: Tensor, rows: Tensor, columns: Tensor, valid: Tensor, scale: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Derivative of the sum over both softmaxes by `own`, [n, d], and by the scale, scalar."""
    gradient, by_scale = torch.empty_like(own), scale.new_zeros(())
    for part in _parts(len(own), len(others)):
        start, stop = part.start, min(part.stop, len(own))
        mine = torch.arange(first + start, first + stop, device=own.device)
        cosine = own[part] @ others.T
        logits = scale * cosine
        weight = torch.exp(logits - rows[mine, None])
        weight += logits.sub_(columns[None, :]).exp_()
        weight[torch.arange(stop - start, device=own.device), mine] -= 2
        weight.masked_fill_(~(valid[mine, None] & valid[None, :]), 0)
        gradient[part] = scale * (weight @ others)
        by_scale = by_scale + cosine.flatten() @ weight.flatten()
    return gradient, by_scale


def _parts(rows: int, columns: int) -> list[slice]:
    """Runs of rows of a logit matrix with at most LOGITS numbers each, but a row at least."""
    step = max(1, LOGITS // max(columns, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]
