"""One batch in, nats by target out: the only forward of every objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pretrain.balance import BalanceTracker, fork
from pretrain.config import DataFacts, Run
from pretrain.data.batch import Batch
from pretrain.data.geometry import relative_positions
from pretrain.data.mask import num_hidden
from pretrain.kernels.contrastive import contrastive_nats
from pretrain.likelihoods import category_nats, gaussian_nats
from pretrain.models.backbone import build_encoder
from pretrain.models.decoder import DenseDecoder
from pretrain.models.feature_norm import FEATURE_NORMS, FeatureNorm
from pretrain.models.pooling import AttentionPool
from pretrain.models.text import TextEncoder
from pretrain.objectives import Target

TeacherCall = Callable[[Float[Tensor, "n 3 s s"]], Float[Tensor, "n l d"]]


@dataclass(frozen=True)
class Losses:
    """What one forward gives. The mean over ranks of every scalar is its value over the global batch."""

    total: Float[Tensor, ""]  # to back-propagate; label losses already carry the balance weight
    nats: dict[str, Float[Tensor, ""]]  # by target, detached, float32, unweighted
    diagnostics: dict[str, Float[Tensor, ""]]  # detached


class Towers(nn.Module):
    """Everything that is kept after pre-training: image encoder, pooling, label heads, text encoder.

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
        self.pool = AttentionPool(self.encoder.width, run.pool.width, run.pool.heads)
        self.pool_norm = FEATURE_NORMS[run.pool.norm](run.pool.width)
        self.norm = nn.LayerNorm(run.pool.width, eps=1e-6)
        if facts.categories:
            self.category = nn.Linear(run.pool.width, len(facts.categories))
        if facts.vocab_size:
            self.text = TextEncoder(run.text, facts.vocab_size)
            self.text_projection = nn.Linear(run.text.width, run.pool.width, bias=False)
            self.image_projection = nn.Linear(run.pool.width, run.pool.width, bias=False)

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n l d"]:
        return self.encoder(images)

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
        if isinstance(self.pool_norm, FeatureNorm):
            self.pool_norm.fold_into(self.pool.cross_dcn.proj)
            self.pool_norm = nn.Identity()


class Temperature(nn.Module):
    """Learned inverse temperature exp(log_scale), at most `max_scale` (CLIP, section 2.5)."""

    def __init__(self, init_scale: float, max_scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([init_scale]).log())
        self.max_scale = max_scale

    def forward(self) -> Float[Tensor, ""]:
        return _AtMost.apply(self.log_scale.float().exp(), self.max_scale)[0]


class _AtMost(torch.autograd.Function):
    """min(values, limit); above the limit the gradient may still lead down, so no value is stuck there."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(values > limit)
        return values.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (is_above,) = ctx.saved_tensors
        return grad.masked_fill(is_above & (grad < 0), 0.0), None


class Pretrainer(nn.Module):
    """The student with its decoders: predicts every target of the objective from one encoded input."""

    def __init__(self, run: Run, facts: DataFacts) -> None:
        super().__init__()
        self.run = run
        self.targets = active_targets(run, facts)
        self.student = Towers(run, facts)
        if self._of_kind("dense"):
            self.decoder = DenseDecoder(run.decoder, self.student.encoder.width)
        if self._of_kind("text"):
            self.temperature = Temperature(run.text.init_scale, run.text.max_scale)

    def forward(self, batch: Batch, teacher: TeacherCall, tracker: BalanceTracker) -> Losses:
        """One mixed input for every group of `input.mixed` images, all targets scored.

        `teacher` encodes normalised images into tokens without gradient; `tracker` owns the weight of the
        label losses and sees both gradients that arrive at the encoder's output.
        """
        dtype = next(self.parameters()).dtype
        images = normalise(batch.views[:, 0], self.run.views.mean, self.run.views.std, dtype)
        tokens = self.student(self._mix(images, batch.mask))
        for_images, for_labels = fork(tokens, tracker)
        owned = self._owned(batch)
        nats, diagnostics = {}, {}
        if dense := self._of_kind("dense"):
            z_y = self._dense_targets(dense, batch, teacher, dtype)
            for name, target in dense.items():
                nats[name] = self._dense_nats(target, batch, for_images, owned, z_y[name])
            diagnostics["std_teacher"] = batch_std(torch.cat([z.mean(dim=1) for z in z_y.values()]))
        if labels := {**self._of_kind("category"), **self._of_kind("text")}:
            embedding = self.student.embed_tokens(self._per_image(for_labels), owned)
            diagnostics["std_embedding"] = batch_std(embedding.detach().float())
            for name, target in labels.items():
                nats[name] = self._label_nats(target, batch, embedding)
        weight = tracker.weight
        total = sum(
            self.targets[name].weight * (weight * value if self.targets[name].group == "label" else value)
            for name, value in nats.items()
        )
        return Losses(total, {name: value.detach() for name, value in nats.items()}, diagnostics)

    def _of_kind(self, kind: str) -> dict[str, Target]:
        return {name: target for name, target in self.targets.items() if target.kind == kind}

    def _mix(self, images: Float[Tensor, "b 3 s s"], mask: Bool[Tensor, "p g g"]) -> Float[Tensor, "p 3 s s"]:
        if self.run.objective.input.mixed == 1:
            return images
        patch = self.run.mask.patch
        pixels = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
        return torch.where(pixels, images[1::2], images[0::2])

    def _owned(self, batch: Batch) -> Bool[Tensor, "b l"]:
        """For each image, the tokens of its input that show it."""
        mask = batch.mask.flatten(1)
        if self.run.objective.input.mixed == 1:
            return torch.ones_like(mask[:1]).expand(len(batch.views), -1)
        return torch.stack([~mask, mask], dim=1).flatten(0, 1)

    def _num_owned(self, target: Target) -> int:
        """Tokens that each image of the target owns: known without looking, since the mask's count is exact."""
        num_patches = self.run.grid**2
        if self.run.objective.input.mixed == 1:
            return num_patches
        second = num_hidden(self.run.grid, self.run.mask.ratio)
        return second if target.image == 1 else num_patches - second

    def _per_image(self, tokens: Float[Tensor, "p l d"]) -> Float[Tensor, "b l d"]:
        return tokens.repeat_interleave(self.run.objective.input.mixed, dim=0)

    def _rows(self, target: Target, batch: Batch) -> Int[Tensor, " n"]:
        """Indices in the batch of the images that a target is about."""
        mixed = self.run.objective.input.mixed
        index = torch.arange(len(batch.views), device=batch.views.device)
        return torch.cat([index[slot::mixed] for slot in self.run.objective.slots(target)])

    def _dense_targets(
        self, targets: dict[str, Target], batch: Batch, teacher: TeacherCall, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The teacher's tokens of every target view, normalised without affine, float32; one teacher call."""
        views = [
            batch.views[self._rows(target, batch), int(target.view == "other")] for target in targets.values()
        ]
        images = normalise(torch.cat(views), self.run.views.mean, self.run.views.std, dtype)
        with torch.no_grad():
            tokens = teacher(images).float()
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        return dict(zip(targets, tokens.split([len(v) for v in views]), strict=True))

    def _dense_nats(
        self, target: Target, batch: Batch, tokens: Tensor, owned: Tensor, z_y: Tensor
    ) -> Float[Tensor, ""]:
        rows = self._rows(target, batch)
        owned = owned[rows]
        places = owned_places(owned, self._num_owned(target))
        own = self._per_image(tokens)[rows].gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
        boxes = batch.boxes[rows]
        relative = relative_positions(
            boxes[:, 0], boxes[:, int(target.view == "other")], batch.sizes[rows, 1], self.run.grid
        )
        prediction = self.decoder(own, places, relative, self.run.grid)
        scored = ~owned if target.scored == "hidden" else torch.ones_like(owned)
        return gaussian_nats(prediction, z_y, scored)

    def _label_nats(self, target: Target, batch: Batch, embedding: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        rows = self._rows(target, batch)
        if target.kind == "category":
            return category_nats(
                self.student.category(embedding[rows]),
                batch.category[rows],
                batch.has_category[rows],
                self.run.label_smoothing,
            )
        texts = self.student.embed_texts(batch.tokens[rows], batch.token_mask[rows])
        images = self.student.project_images(embedding[rows])
        return contrastive_nats(images, texts, batch.has_text[rows], self.temperature())


def active_targets(run: Run, facts: DataFacts) -> dict[str, Target]:
    """The objective's targets that the data can serve; ValueError when that leaves none."""
    has = {"dense": True, "category": bool(facts.categories), "text": bool(facts.vocab_size)}
    active = {name: target for name, target in run.objective.targets.items() if has[target.kind]}
    if not active:
        raise ValueError(
            f"none of the targets {sorted(run.objective.targets)} has labels in the data: give a source with "
            "categories or captions, or an objective with a dense target"
        )
    return active


def owned_places(owned: Bool[Tensor, "n l"], num_owned: int) -> Int[Tensor, "n k"]:
    """Indices of the owned tokens of each image in grid order; every row owns `num_owned`."""
    return (~owned).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_owned]


def normalise(
    views: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> Float[Tensor, "n 3 s s"]:
    """uint8 views [n, 3, s, s] as (value / 255 - mean) / std, computed in float32, in `dtype`."""
    pixels = views.float() / 255
    # Plain numbers: a tensor of them, made on a GPU, would wait for the work that is queued there.
    channels = [
        (pixels[:, c] - shift) / scale for c, (shift, scale) in enumerate(zip(mean, std, strict=True))
    ]
    return torch.stack(channels, dim=1).to(dtype)


def batch_std(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Standard deviation over the batch of unit-normalised features, mean over dimensions.

    About 1 / sqrt(d) for features spread over the sphere, 0 after collapse (SimSiam, arXiv 2011.10566).
    """
    return F.normalize(features.detach().float(), dim=-1).std(dim=0, correction=0).mean()
