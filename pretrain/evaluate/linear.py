"""How well does a linear classifier on frozen features tell the categories?"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pretrain.evaluate.evidence import NotMeasured

C = 0.1  # inverse L2 penalty on standardised features; fixed, so that no checkpoint is tuned more than another
MAX_ITERATIONS = 2000  # of L-BFGS; it stops by its own tolerance long before


def linear_probe(
    train: Float[Tensor, "n d"], labels: Int[Tensor, " n"], heldout: Float[Tensor, "m d"]
) -> Int[Tensor, " m"]:
    """Predicted categories of `heldout` by multinomial logistic regression on standardised training features.

    Raises NotMeasured when the training images show fewer than two categories.
    """
    if len(labels.unique()) < 2:
        raise NotMeasured(
            f"the training images show {len(labels.unique())} category, a linear probe needs two or more"
        )
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=MAX_ITERATIONS))
    probe.fit(train.double().numpy(), labels.numpy())
    return torch.from_numpy(probe.predict(heldout.double().numpy()))
