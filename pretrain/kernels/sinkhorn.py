"""Which share of an image belongs to each prototype, if all prototypes are used alike?"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from pretrain.collectives import sum_over_ranks

MIN_EXPONENT = -40.0  # exp of it is far below any share that counts, and no sum of it is zero in float32


@torch.no_grad()
def sinkhorn_codes(
    similarities: Float[Tensor, "n k"], epsilon: float, iterations: int, max_exponent: float
) -> Float32[Tensor, "n k"]:
    """Codes: shares of the prototypes in each sample of this rank, positive, every row's sum 1, no gradient.

    exp(similarities / epsilon), exponents cut to [MIN_EXPONENT, max_exponent], then in each iteration every
    prototype is divided by its sum over the samples of all ranks, and every sample by its own sum, which
    comes last. Cosines at epsilon >= 0.025 never reach the lower cut. Every rank makes `iterations`
    all-reduces of k numbers, whatever its data. SwAV's total and factors 1 / k and 1 / n cancel between the
    two divisions. Source: SwAV (arXiv 2006.09882), section 3.1; the upper cut: HVP-MTL (arXiv 2310.07510),
    section 3.2.
    """
    codes = (similarities.float() / epsilon).clamp(MIN_EXPONENT, max_exponent).exp()
    for _ in range(iterations):
        codes /= sum_over_ranks(codes.sum(0))
        codes /= codes.sum(1, keepdim=True)
    return codes


def cluster_nats(
    scores: Float[Tensor, "n k"], codes: Float[Tensor, "n k"], temperature: float
) -> Float[Tensor, " n"]:
    """Cross-entropy of the softmax over prototypes of `scores` / `temperature` given an image's `codes`.

    At equal scores it is ln k; it cannot fall below the entropy of the codes. Swapped prediction
    scores one view with the codes of the other, both ways. Source: SwAV (arXiv 2006.09882), equation 2.
    """
    return -(codes * (scores.float() / temperature).log_softmax(dim=1)).sum(dim=1)
