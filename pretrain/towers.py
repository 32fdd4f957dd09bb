"""What is kept after pre-training, and what does the teacher average? The towers over images, texts and tags."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.models.backbone import build_encoder
from pretrain.models.feature_norm import FEATURE_NORMS, FeatureNorm
from pretrain.models.pooling import AttentionPool, MeanPool
from pretrain.models.prototypes import Prototypes
from pretrain.models.tag_decoder import TagDecoder
from pretrain.models.text import TextEncoder
from pretrain.served import active_targets

EMBEDDED = ("global", "category", "text", "clusters")  # kinds that are predicted from the image's embedding


class Towers(nn.Module):
    """Everything that is kept after pre-training: image encoder, and as far as the run's targets need them
    pooling, projectors of global features and clusters, label heads, tag decoder and text encoder.

    The teacher is a second one of these. Calling it gives what a teacher is asked for.
    """

    def __init__(self, run: Run, facts: DataFacts) -> None:
        super().__init__()
        self.encoder = build_encoder(run.backbone, run.views.size)
        if run.mask.patch % self.encoder.stride:
            raise ValueError(
                f"mask.patch={run.mask.patch} must be a multiple of {self.encoder.stride}, the pixels along one side "
                f"of a token of {run.backbone.size}: mask squares are whole tokens"
            )
        kinds = {target.kind for target in active_targets(run, facts).values()}
        if kinds & set(EMBEDDED):
            if run.pool.kind == "attention":
                self.pool = AttentionPool(self.encoder.width, run.pool.width, run.pool.heads)
            else:
                self.pool = MeanPool(self.encoder.width, run.pool.width)
            self.pool_norm = FEATURE_NORMS[run.pool.norm](run.pool.width)
            self.norm = nn.LayerNorm(run.pool.width, eps=1e-6)
        if "global" in kinds:
            self.projector = projector(run.pool.width, run.projection.hidden, run.projection.width)
        if "clusters" in kinds:
            clusters = run.clusters
            self.cluster_projector = projector(run.pool.width, clusters.hidden, clusters.width)
            self.prototypes = Prototypes(clusters.width, clusters.prototypes)
        if "tags" in kinds:
            self.tags = TagDecoder(run.tags, self.encoder.width, len(facts.tags))
        if "category" in kinds:
            self.category = nn.Linear(run.pool.width, len(facts.categories))
        if "text" in kinds:
            self.text = TextEncoder(run.text, facts.vocab_size)
            self.text_projection = nn.Linear(run.text.width, run.pool.width, bias=False)
            self.image_projection = nn.Linear(run.pool.width, run.pool.width, bias=False)

    def forward(
        self,
        images: Float[Tensor, "n 3 s s"] | None,
        kinds: tuple[str, ...],
        summary: bool,
        texts: tuple[Int[Tensor, "m length"], Bool[Tensor, "m length"]] | None = None,
    ) -> dict[str, Tensor]:
        """What a teacher says of images, by kind of target, of those asked for: `dense` tokens [n, l, d], before
        them the summary if asked; `global` projections [n, p]; `tags` similarities to the labels [n, k], float32;
        `projected` unit vectors [n, e]. Of `texts` alone (tokens, mask), without images: `texts` unit vectors [m, e].
        """
        if images is None:
            return {"texts": self.embed_texts(*texts)}
        tokens = self.encoder(images, summary)
        patches, said = tokens[:, int(summary) :], {"dense": tokens}
        if "global" in kinds:
            said["global"] = self.projector(self.embed_tokens(patches))
        if "projected" in kinds:
            said["projected"] = self.project_images(self.embed_tokens(patches))
        if "tags" in kinds:
            said["tags"] = self.tags(patches, None, images.shape[-1] // self.encoder.stride)[1]
        return {kind: said[kind] for kind in kinds}

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
        return self.finish_embedding(self.pool(tokens, owned))

    def finish_embedding(self, pooled: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        """What follows the pooling, over all images of all ranks."""
        return self.norm(self.pool_norm(pooled))

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
            self.pool_norm.fold_into(self.pool.last)
            self.pool_norm = nn.Identity()


def projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, batch norm, ReLU, Linear, batch norm: embedding [n, width] -> [n, out].

    Batch norms without affine, over all ranks. Source: MoCo v3 (arXiv 2104.02057), BYOL (arXiv 2006.07733).
    """
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        FeatureNorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
        FeatureNorm(out),
    )
