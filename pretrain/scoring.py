"""How is what the student predicts of each kind of target scored? One function a kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretrain.balance import IMAGE, LABEL, BalanceTracker
from pretrain.collapse import Seen
from pretrain.config import Projection
from pretrain.data.geometry import relative_positions
from pretrain.data.mask import num_hidden
from pretrain.inputs import Encoded, owned_places, rows_of
from pretrain.kernels.contrastive import contrastive_nats, matching_nats, text_ids
from pretrain.kernels.sinkhorn import cluster_nats, sinkhorn_codes
from pretrain.likelihoods import (
    POSITIONAL,
    agreement_nats,
    bernoulli_nats,
    category_nats,
    code_nats,
    decorrelation_nats,
    mean_over_labelled,
    uniform_part,
)
from pretrain.micro_batches import in_parts
from pretrain.objective import Group, Target
from pretrain.targets import positives
from pretrain.towers import EMBEDDED

if TYPE_CHECKING:
    from pretrain.pretrainer import Pretrainer

GOLDEN = (1 + math.sqrt(5)) / 2  # multiples of 1 / GOLDEN, modulo 1, are spread evenly (Knuth, TAOCP, 6.4)
SCATTER = 2654435761  # 2^32 / GOLDEN


class Each(NamedTuple):
    """A target's nats image by image, without gradient: their mean over those that count is the target's loss."""

    nats: Float[Tensor, " n"]
    counts: Bool[Tensor, " n"]
    position: Int[Tensor, " n"]  # of the image in the run's order


class Scored(NamedTuple):
    """A target's nats over this rank's batch; their mean over ranks is the loss."""

    nats: Float[Tensor, ""]
    seen: Seen | None  # what shows a collapse
    each: Each | None  # None where only the batch as a whole has a loss


class Step:
    """One batch in the middle of its forward pass; what several targets read of it is computed once."""

    def __init__(
        self, model: Pretrainer, encoded: Encoded, z_y: dict[str, Tensor], tracker: BalanceTracker
    ) -> None:
        self.model, self.run, self.encoded, self.z_y = model, model.run, encoded, z_y
        self.batch, self._tracker = encoded.batch, tracker
        self.in_parts = partial(in_parts, model.micro_batches)
        self._embeddings: dict[Group, Tensor] = {}  # no functools.cache: one of a method keeps the step alive

    def embedding(self, group: Group) -> Float[Tensor, "b e"]:
        """Of every image, from the branch of the encoder's output whose gradients count as the group's."""
        if group not in self._embeddings:
            student, encoded = self.model.student, self.encoded
            tokens = self.read(self._readers(EMBEDDED, group), group, encoded.tokens[group])
            pooled = self.in_parts(student.pool, tokens, encoded.owned)
            self._embeddings[group] = student.finish_embedding(pooled)
        return self._embeddings[group]

    @cached_property
    def projected(self) -> Float[Tensor, "b p"]:
        """Prediction of every image's global features."""
        return self.model.predictor(self.model.student.projector(self.embedding("image")))

    @cached_property
    def tags(self) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        """Logits of the tags, and similarities of the image to their embeddings."""
        tokens = self.read(self._readers(("tags",), "label"), "label", self.encoded.tokens["label"])
        decode = partial(self.model.student.tags, grid=self.model.grid)
        return self.in_parts(decode, tokens, self.encoded.owned)

    def read(
        self, reader: str, group: Group, tokens: Float[Tensor, "n l d"], rows: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n l d"]:
        """The tokens of images `rows` (None: of all) as they are; the gradient that comes back is told as the
        reader's where the step is logged.
        """
        tokens = tokens.view_as(tokens)
        mixed, num_images = self.run.objective.input.mixed, len(self.batch.views)
        if rows is None:
            rows = torch.arange(num_images, device=tokens.device)
        position = LABEL if group == "label" else IMAGE
        self._tracker.watch(reader, position, tokens, rows, mixed, num_images // mixed)
        return tokens

    def _readers(self, kinds: tuple[str, ...], group: Group) -> str:
        """Names of the targets that share what is read for their kinds."""
        targets = self.model.targets.items()
        return "+".join(name for name, target in targets if target.kind in kinds and target.group == group)

    def rows(self, target: Target) -> Int[Tensor, " n"]:
        """Indices in the batch of the images that a target is about."""
        return rows_of(self.run.objective, target, self.batch)

    def mean(self, target: Target, nats: Float[Tensor, " n"], seen: Seen | None) -> Scored:
        """Over the images of a target: every rank has as many, so the mean over ranks is the global one."""
        everything = torch.ones_like(nats, dtype=torch.bool)
        return Scored(
            nats.mean(), seen, Each(nats.detach(), everything, self.batch.position[self.rows(target)])
        )

    def mean_over_labelled(self, target: Target, nats: Tensor, is_labelled: Bool[Tensor, " n"]) -> Scored:
        """Over the images of a target that have its label, which may be more on some ranks than on others."""
        each = Each(nats.detach(), is_labelled, self.batch.position[self.rows(target)])
        return Scored(mean_over_labelled(nats, is_labelled), None, each)


def spatial_nats(step: Step, name: str, target: Target) -> Scored:
    """Pixels, features or codes of every patch, from the decoder that the target names."""
    rows, z_y = step.rows(target), step.z_y[name]
    prediction = PREDICTED[target.decoder](step, name, target, rows)
    owned = step.encoded.owned[rows]
    scored = ~owned if target.scored == "hidden" else torch.ones_like(owned)
    if target.summary:
        scored = F.pad(scored, (1, 0), value=True)
    if target.encoder == "tokenizer":
        return step.mean(target, code_nats(prediction, z_y, scored), _seen_codes(z_y, prediction.shape[-1]))
    seen = None if target.kind == "pixels" else Seen(z_y.mean(dim=1), prediction.detach().float().mean(dim=1))
    if target.score == "boltzmann":
        nats = dense_matching(step.run.projection, prediction, z_y, step.batch.position[rows])
        return step.mean(target, nats, seen)
    nats = POSITIONAL[target.score](prediction, z_y, scored)
    if target.uniformity:
        nats = nats + 0.5 * target.uniformity * uniform_part(prediction, z_y)
    return step.mean(target, nats, seen)


def _by_transformer(step: Step, name: str, target: Target, rows: Tensor) -> Float[Tensor, "n l out"]:
    """From the tokens that the image owns, wherever its target view lies."""
    model, encoded, batch = step.model, step.encoded, step.batch
    places = owned_places(encoded.owned[rows], _num_owned(step, target))
    tokens = step.read(name, "image", encoded.tokens["image"][rows], rows)
    own = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
    boxes = batch.boxes[rows]
    relative = relative_positions(
        boxes[:, 0], boxes[:, int(target.view == "other")], batch.sizes[rows, 1], model.grid
    )
    decode = partial(model.decoder, grid=model.grid, output=target.output)
    return step.in_parts(decode, own, places, relative)


def _by_linear(step: Step, name: str, target: Target, rows: Tensor) -> Float[Tensor, "n l out"]:
    """From the token at the same place, whoever owns it."""
    tokens = step.encoded.tokens["image"][rows]
    if target.summary:
        tokens = torch.cat([step.encoded.summary["image"][rows, None], tokens], dim=1)
    return step.model.linear[target.output](step.read(name, "image", tokens, rows))


PREDICTED: dict[str, Callable[[Step, str, Target, Tensor], Tensor]] = {
    "transformer": _by_transformer,
    "linear": _by_linear,
}


def _num_owned(step: Step, target: Target) -> int:
    """Tokens that each image of the target owns: known without looking, since the mask's count is exact."""
    run, num_tokens = step.run, step.model.grid**2
    if not run.objective.input.hides:
        return num_tokens
    hidden = num_hidden(run.grid, run.mask.ratio) * (step.model.grid // run.grid) ** 2
    return hidden if target.image == 1 else num_tokens - hidden


def dense_matching(
    projection: Projection,
    prediction: Float[Tensor, "n l d"],
    z_y: Float[Tensor, "n l d"],
    position: Int[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Predicted patches against the same patches of their target view and those of all images of the global
    batch: some of each image, spread over it from a start that its position in the run's order decides.
    Mean over an image's. Where a patch lies, the decoder knows from the views' geometry.
    """
    num_patches = prediction.shape[1]
    steps = torch.arange(min(projection.dense_samples, num_patches), device=position.device)
    start = position * SCATTER % num_patches
    drawn = ((start[:, None] + steps * _stride(num_patches)) % num_patches)[..., None]
    pairs = (
        F.normalize(z.gather(1, drawn.expand(-1, -1, z.shape[-1])).flatten(0, 1).float(), dim=-1)
        for z in (prediction, z_y)
    )
    return matching_nats(*pairs, 1 / projection.temperature).unflatten(0, drawn.shape[:2]).mean(1)


def _stride(num_patches: int) -> int:
    """A step from patch to patch, near the golden ratio of them all, that meets each once before any again.

    It shares no factor with the number of patches, nor with its root: the first patches of a square grid lie in
    columns that all differ, and in rows that are spread as evenly as multiples of the golden ratio.
    """
    coprime = (step for step in range(1, num_patches + 1) if math.gcd(step, num_patches) == 1)
    return min(coprime, key=lambda step: abs(step - num_patches / GOLDEN))


def global_nats(step: Step, name: str, target: Target) -> Scored:
    """The projection of the whole image, against one target or all of the global batch."""
    prediction, z_y = step.projected[step.rows(target)], step.z_y[name]
    seen = Seen(z_y, prediction.detach().float())
    if target.keep == "decorrelation":
        return Scored(decorrelation_nats(prediction, z_y), seen, None)
    if target.score == "boltzmann":
        pair = (F.normalize(z.float(), dim=-1) for z in (prediction, z_y))
        return step.mean(target, matching_nats(*pair, 1 / step.run.projection.temperature), seen)
    z_y = F.layer_norm(z_y, z_y.shape[-1:], eps=1e-6)
    everywhere = torch.ones(len(z_y), 1, dtype=torch.bool, device=z_y.device)
    return step.mean(target, POSITIONAL[target.score](prediction[:, None], z_y[:, None], everywhere), seen)


def label_category_nats(step: Step, name: str, target: Target) -> Scored:
    """The linear classifier's cross-entropy over the labelled images."""
    rows, batch = step.rows(target), step.batch
    logits = step.model.student.category(step.embedding("label")[rows])
    nats = category_nats(logits, batch.category[rows], step.run.label_smoothing)
    return step.mean_over_labelled(target, nats, batch.has_category[rows])


def text_nats(step: Step, name: str, target: Target) -> Scored:
    """Images against the texts of the global batch and back; equal texts are no negatives."""
    rows, batch, student = step.rows(target), step.batch, step.model.student
    tokens = batch.tokens[rows]
    texts = step.in_parts(student.embed_texts, tokens, batch.token_mask[rows])
    images = student.project_images(step.embedding("label")[rows])
    scale = step.model.temperature()
    has_text = batch.has_text[rows]
    nats, each = contrastive_nats(images, texts, has_text, scale, text_ids(tokens))
    return Scored(nats, None, Each(each, has_text, batch.position[rows]))


def tag_nats(step: Step, name: str, target: Target) -> Scored:
    """Every tag for itself; or the teacher's softmax of similarities to all of them."""
    rows, batch, tags = step.rows(target), step.batch, step.run.tags
    logits, similarities = (said[rows] for said in step.tags)
    if target.score == "boltzmann":
        z_y = step.z_y[name]
        seen = Seen(z_y, similarities.detach(), z_y.softmax(dim=-1))
        return step.mean(target, agreement_nats(similarities, z_y), seen)
    has = positives(batch.tags[rows], logits.shape[-1])
    nats = bernoulli_nats(
        logits,
        has,
        positive_weight=tags.positive_weight,
        positive_focus=tags.positive_focus,
        negative_focus=tags.negative_focus,
    )
    return step.mean_over_labelled(target, nats, batch.has_tags[rows])


def clusters_nats(step: Step, name: str, target: Target) -> Scored:
    """Swapped prediction: each view the clusters of the other, whose codes are even over the global batch."""
    student, clusters = step.model.student, step.run.clusters
    features = student.cluster_projector(step.embedding("image"))
    scores = student.prototypes(features)
    codes = [
        sinkhorn_codes(of_view, clusters.epsilon, clusters.iterations, clusters.max_exponent)
        for of_view in (scores[0::2], scores[1::2])  # views of an image stand side by side
    ]
    swapped = torch.stack(codes[::-1], dim=1).flatten(0, 1)
    seen = Seen(features.detach().float(), None, swapped)
    return step.mean(target, cluster_nats(scores, swapped, clusters.temperature), seen)


def _seen_codes(codes: Int[Tensor, "n l"], num_codes: int) -> Seen:
    """How often an image has each code."""
    counts = torch.zeros(len(codes), num_codes, device=codes.device)
    counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float32))
    return Seen(counts, None, counts / codes.shape[1])


SCORES: dict[str, Callable[[Step, str, Target], Scored]] = {
    "pixels": spatial_nats,
    "dense": spatial_nats,
    "global": global_nats,
    "category": label_category_nats,
    "text": text_nats,
    "tags": tag_nats,
    "clusters": clusters_nats,
}
