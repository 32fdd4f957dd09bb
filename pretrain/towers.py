"""What is kept after pre-training, and what does the teacher average? The towers over images and texts."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pretrain.config import DataFacts, Projection, Run
from pretrain.models.backbone import build_encoder
from pretrain.models.feature_norm import FEATURE_NORMS, FeatureNorm
from pretrain.models.pooling import AttentionPool
from pretrain.models.text import TextEncoder
from pretrain.objectives import Target

EMBEDDED = ("global", "category", "text")  # kinds that are predicted from the image's embedding


class Towers(nn.Module):
    """Everything that is kept after pre-training: image encoder, and as far as the run's targets need them
    pooling, projector of global features, label heads and text encoder.

    The teacher is a second one of these. Calling it encodes images into tokens.
    """

    def __init__(self, run: Run, facts: DataFacts) -> None:
        super().__init__()
        self.encoder = build_encoder(run.backbone, run.views.size)
        if self.encoder.stride != run.mask.patch:
            raise ValueError(
                f"mask.patch={run.mask.patch} must equal {self.encoder.stride}, the pixels along one side of a "
                f"token of {run.backbone.size}: mask squares are tokens"
            )
        kinds = {target.kind for target in active_targets(run, facts).values()}
        if kinds & set(EMBEDDED):
            self.pool = AttentionPool(self.encoder.width, run.pool.width, run.pool.heads)
            self.pool_norm = FEATURE_NORMS[run.pool.norm](run.pool.width)
            self.norm = nn.LayerNorm(run.pool.width, eps=1e-6)
        if "global" in kinds:
            self.projector = projector(run.pool.width, run.projection)
        if "category" in kinds:
            self.category = nn.Linear(run.pool.width, len(facts.categories))
        if "text" in kinds:
            self.text = TextEncoder(run.text, facts.vocab_size)
            self.text_projection = nn.Linear(run.text.width, run.pool.width, bias=False)
            self.image_projection = nn.Linear(run.pool.width, run.pool.width, bias=False)

    def forward(
        self, images: Float[Tensor, "n 3 s s"], project: bool = False
    ) -> Float[Tensor, "n l d"] | tuple[Float[Tensor, "n l d"], Float[Tensor, "n p"]]:
        """Tokens, and with `project` global features beside them."""
        tokens = self.encoder(images)
        return (tokens, self.projector(self.embed_tokens(tokens))) if project else tokens

    @property
    def has_embedding(self) -> bool:
        """Has the run trained a global embedding of images?"""
        return hasattr(self, "pool")

    @property
    def has_categories(self) -> bool:
        return hasattr(self, "category")

    @property
    def has_texts(self) -> bool:
        return hasattr(self, "text")

    def embed_tokens(
        self, tokens: Float[Tensor, "n l d"], owned: Bool[Tensor, "n l"] | None = None
    ) -> Float[Tensor, "n e"]:
        """Global embedding of images from the tokens that each owns; category and text share it."""
        return self.norm(self.pool_norm(self.pool(tokens, owned)))

    def embed_texts(
        self, tokens: Int[Tensor, "n length"], token_mask: Bool[Tensor, "n length"]
    ) -> Float[Tensor, "n e"]:
        """Captions as unit vectors in float32, to compare with `project_images`."""
        return F.normalize(self.text_projection(self.text(tokens, token_mask)).float(), dim=-1)

    def project_images(self, embedding: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        """Image embeddings as unit vectors in float32, in the space of the captions."""
        return F.normalize(self.image_projection(embedding).float(), dim=-1)

    def fold_norms(self) -> None:
        """Hands what FeatureNorms do in eval mode to the layers before them, for readers that know none."""
        self.encoder.fold_norm()
        if self.has_embedding and isinstance(self.pool_norm, FeatureNorm):
            self.pool_norm.fold_into(self.pool.cross_dcn.proj)
            self.pool_norm = nn.Identity()


def projector(width: int, projection: Projection) -> nn.Sequential:
    """Linear, batch norm, ReLU, Linear, batch norm: embedding [n, width] -> [n, projection.width].

    Batch norms without affine, over all ranks. Source: MoCo v3 (arXiv 2104.02057), BYOL (arXiv 2006.07733).
    """
    return nn.Sequential(
        nn.Linear(width, projection.hidden, bias=False),
        FeatureNorm(projection.hidden),
        nn.ReLU(),
        nn.Linear(projection.hidden, projection.width, bias=False),
        FeatureNorm(projection.width),
    )


def active_targets(run: Run, facts: DataFacts) -> dict[str, Target]:
    """The objective's targets that the data can serve; ValueError when that leaves none."""
    lacks = {"category": not facts.categories, "text": not facts.vocab_size}
    active = {
        name: target for name, target in run.objective.targets.items() if not lacks.get(target.kind, False)
    }
    if not active:
        raise ValueError(
            f"none of the targets {sorted(run.objective.targets)} has labels in the data: give a source with "
            "categories or captions, or an objective that predicts images"
        )
    return active
