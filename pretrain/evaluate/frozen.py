"""How well do a frozen encoder's features of freshly cropped images tell the categories to a head that is trained on
them?
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pretrain.config import Run
from pretrain.evaluate.attentive import AttentiveProbe
from pretrain.evaluate.divided import moments
from pretrain.evaluate.fine_tune_recipes import ATTENTIVE, LINEAR, FineTune
from pretrain.models.pixels import normalise

AT_ONCE = 256  # images that the encoder is given together


class FrozenClassifier(nn.Module):
    """Encoder that stays as it is, and a trained head of its features: images [b, 3, s, s] -> logits [b, k].

    `kind` is LINEAR, a layer on the mean token, standardised, or ATTENTIVE, an AttentiveProbe of all tokens.
    """

    def __init__(self, encoder: nn.Module, num_categories: int, kind: str) -> None:
        super().__init__()
        self.precision = torch.float32  # of the encoder's passes
        self.encoder, self.kind = encoder, kind
        self.head = HEADS[kind](encoder.width, num_categories)

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b k"]:
        return self.head(self._features(images))

    @torch.no_grad()
    def features(self, views: UInt8[Tensor, "b 3 s s"], run: Run) -> Float[Tensor, "b ..."]:
        """Of views on the CPU what the head reads, some images at a time; [b, d], or [b, l, d] of ATTENTIVE."""
        device = next(self.head.parameters()).device
        parts = []
        for some in views.split(AT_ONCE):
            images = normalise(some.to(device), run.views.mean, run.views.std, torch.float32)
            with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
                found = self._features(images)
            parts.append(found.float())
        return torch.cat(parts)

    def _features(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b ..."]:
        tokens = self.encoder(images)
        return tokens if self.kind == ATTENTIVE else tokens.mean(dim=1)

    def train(self, mode: bool = True) -> FrozenClassifier:
        super().train(mode)
        self.encoder.eval()
        return self

    def groups(self, settings: FineTune) -> list[dict]:
        """Parameter groups, all at the rate of the recipe."""
        is_matrix = {name: parameter.ndim > 1 for name, parameter in self.head.named_parameters()}
        groups = []
        for matrices in (True, False):
            own = [
                parameter for name, parameter in self.head.named_parameters() if is_matrix[name] == matrices
            ]
            # Without weight decay timm's LARS adapts what it is told to: weights, not biases.
            adapts = {"always_adapt": matrices} if settings.optimizer == "lars" else {}
            decay = settings.weight_decay if matrices else 0.0
            groups.append({"params": own, "weight_decay": decay, "lr_scale": 1.0} | adapts)
        return groups


class Standardised(nn.Module):
    """A batch norm without affine, whose batch is that of all ranks: [b, d] -> [b, d].

    Nothing is differentiated by its statistics: features of a frozen encoder depend on nothing that is trained.
    """

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-6) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, values: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        mean, variance = self.mean, self.variance
        if self.training:
            mean, variance = (found.float().to(values.device) for found in moments(values.detach().cpu()))
            self.mean.lerp_(mean, self.momentum)
            self.variance.lerp_(variance, self.momentum)
        return (values - mean) / (variance + self.eps).sqrt()


def _linear(width: int, num_categories: int) -> nn.Module:
    """MAE's (arXiv 2111.06377, appendix A.1)."""
    head = nn.Sequential(Standardised(width), nn.Linear(width, num_categories))
    nn.init.trunc_normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    return head


HEADS: dict[str, Callable[[int, int], nn.Module]] = {LINEAR: _linear, ATTENTIVE: AttentiveProbe}
