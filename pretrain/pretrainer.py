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
from pretrain.kernels.contrastive import contrastive_nats, matching_nats
from pretrain.likelihoods import POSITIONAL, category_nats, decorrelation_nats
from pretrain.models.decoder import DenseDecoder
from pretrain.objectives import Target
from pretrain.towers import Towers, active_targets, projector

# (images) -> tokens [n, l, d]; (images, project=True) -> (tokens, projections [n, p])
TeacherCall = Callable[..., Any]
SPATIAL = ("pixels", "dense")  # kinds with a value at every patch
SCATTER = 2654435761  # 2^32 over the golden ratio: multiples of it are spread evenly (Knuth, TAOCP, 6.4)


@dataclass(frozen=True)
class Losses:
    """What one forward gives. The mean over ranks of every scalar is its value over the global batch."""

    total: Float[Tensor, ""]  # to back-propagate; label losses already carry the balance weight
    nats: dict[str, Float[Tensor, ""]]  # by target, detached, float32, unweighted
    diagnostics: dict[str, Float[Tensor, ""]]  # detached


class MaskPatch(nn.Module):
    """What the hidden patches of a masked input show: one learned patch, for every backbone alike.

    A linear patch embedding turns it into one learned vector, the mask token of BEiT (arXiv 2106.08254).
    """

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.pixels = nn.Parameter(torch.zeros(3, patch, patch))  # the mean colour

    def forward(
        self, images: Float[Tensor, "b 3 s s"], hidden: Bool[Tensor, "b 1 s s"]
    ) -> Float[Tensor, "b 3 s s"]:
        repeats = images.shape[-1] // self.pixels.shape[-1]
        return torch.where(hidden, self.pixels.repeat(1, repeats, repeats), images)


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
        if spatial := self._of_kind(*SPATIAL):
            widths = {"pixels": 3 * run.mask.patch**2, "dense": self.student.encoder.width}
            used = {target.kind: widths[target.kind] for target in spatial.values()}
            self.decoder = DenseDecoder(run.decoder, self.student.encoder.width, used)
        if self._of_kind("global"):
            self.predictor = projector(run.projection.width, run.projection)
        if self._of_kind("text"):
            self.temperature = Temperature(run.text.init_scale, run.text.max_scale)
        if run.objective.input.is_masked:
            self.mask_patch = MaskPatch(run.mask.patch)

    def forward(self, batch: Batch, teacher: TeacherCall, tracker: BalanceTracker) -> Losses:
        """One input for every group of `input.mixed` images, all targets scored.

        `teacher` encodes normalised images without gradient; `tracker` owns the weight of the label losses
        and sees both gradients that arrive at the encoder's output.
        """
        dtype = next(self.parameters()).dtype
        images = normalise(batch.views[:, 0], self.run.views.mean, self.run.views.std, dtype)
        tokens = self.student(self._input(images, batch.mask))
        for_images, for_labels = fork(tokens, tracker)
        owned = self._owned(batch)
        z_y = self._taught(batch, teacher, dtype)
        nats, diagnostics = {}, {}
        for name, target in self._of_kind(*SPATIAL).items():
            z = z_y[name] if name in z_y else self._pixels(target, batch)
            nats[name] = self._spatial_nats(target, batch, for_images, owned, z)
        if targets := self._of_kind("global"):
            projected = self._project(for_images, owned)
            for name, target in targets.items():
                nats[name] = self._global_nats(target, projected[self._rows(target, batch)], z_y[name])
        if labels := self._of_kind("category", "text"):
            embedding = self.student.embed_tokens(self._per_image(for_labels), owned)
            diagnostics["std_embedding"] = batch_std(embedding.detach().float())
            for name, target in labels.items():
                nats[name] = self._label_nats(target, batch, embedding)
        if z_y:
            pooled = [z.mean(dim=1) if z.ndim == 3 else z for z in z_y.values()]
            diagnostics["std_teacher"] = torch.stack([batch_std(z) for z in pooled]).mean()
        weight = tracker.weight
        total = sum(
            self.targets[name].weight * (weight * value if self.targets[name].group == "label" else value)
            for name, value in nats.items()
        )
        return Losses(total, {name: value.detach() for name, value in nats.items()}, diagnostics)

    def _of_kind(self, *kinds: str) -> dict[str, Target]:
        return {name: target for name, target in self.targets.items() if target.kind in kinds}

    def _input(
        self, images: Float[Tensor, "b 3 s s"], mask: Bool[Tensor, "i g g"]
    ) -> Float[Tensor, "i 3 s s"]:
        if not self.run.objective.input.hides:
            return images
        patch = self.run.mask.patch
        hidden = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
        if self.run.objective.input.is_masked:
            return self.mask_patch(images, hidden)
        return torch.where(hidden, images[1::2], images[0::2])

    def _owned(self, batch: Batch) -> Bool[Tensor, "b l"]:
        """For each image, the tokens of its input that show it."""
        mask = batch.mask.flatten(1)
        if self.run.objective.input.mixed == 1:
            return ~mask
        return torch.stack([~mask, mask], dim=1).flatten(0, 1)

    def _num_owned(self, target: Target) -> int:
        """Tokens that each image of the target owns: known without looking, since the mask's count is exact."""
        num_patches = self.run.grid**2
        if not self.run.objective.input.hides:
            return num_patches
        hidden = num_hidden(self.run.grid, self.run.mask.ratio)
        return hidden if target.image == 1 else num_patches - hidden

    def _per_image(self, tokens: Float[Tensor, "p l d"]) -> Float[Tensor, "b l d"]:
        return tokens.repeat_interleave(self.run.objective.input.mixed, dim=0)

    def _rows(self, target: Target, batch: Batch) -> Int[Tensor, " n"]:
        """Indices in the batch of the images that a target is about."""
        mixed = self.run.objective.input.mixed
        index = torch.arange(len(batch.views), device=batch.views.device)
        return torch.cat([index[slot::mixed] for slot in self.run.objective.slots(target)])

    def _view(self, target: Target, batch: Batch) -> Tensor:
        return batch.views[self._rows(target, batch), int(target.view == "other")]

    def _taught(self, batch: Batch, teacher: TeacherCall, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the teacher makes of every target view that it encodes, float32: tokens, normalised without
        affine, [n, l, d], or projections [n, p]; one teacher call.
        """
        targets = {name: target for name, target in self.targets.items() if target.encoder == "ema"}
        if not targets:
            return {}
        views = [self._view(target, batch) for target in targets.values()]
        images = normalise(torch.cat(views), self.run.views.mean, self.run.views.std, dtype)
        with torch.no_grad():
            if self._of_kind("global"):
                tokens, projections = teacher(images, project=True)
            else:
                tokens = projections = teacher(images)
        z_y, start = {}, 0
        for (name, target), view in zip(targets.items(), views, strict=True):
            part = slice(start, start + len(view))
            if target.kind == "global":
                z_y[name] = projections[part].float()
            else:
                z_y[name] = F.layer_norm(tokens[part].float(), tokens.shape[-1:], eps=1e-6)
            start += len(view)
        return z_y

    def _pixels(self, target: Target, batch: Batch) -> Float[Tensor, "n l d"]:
        """Pixels of every patch of the target view, standardised within the patch (MAE, arXiv 2111.06377)."""
        patch = self.run.mask.patch
        view = self._view(target, batch).float() / 255
        pixels = F.unfold(view, patch, stride=patch).transpose(1, 2)  # [n, l, 3 patch**2]
        return F.layer_norm(pixels, pixels.shape[-1:], eps=1e-6)

    def _spatial_nats(
        self, target: Target, batch: Batch, tokens: Tensor, owned: Tensor, z_y: Float[Tensor, "n l out"]
    ) -> Float[Tensor, ""]:
        rows = self._rows(target, batch)
        owned = owned[rows]
        places = owned_places(owned, self._num_owned(target))
        own = self._per_image(tokens)[rows].gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
        boxes = batch.boxes[rows]
        relative = relative_positions(
            boxes[:, 0], boxes[:, int(target.view == "other")], batch.sizes[rows, 1], self.run.grid
        )
        prediction = self.decoder(own, places, relative, self.run.grid, target.kind)
        if target.score == "boltzmann":
            return self._dense_matching(prediction, z_y, batch.position[rows])
        scored = ~owned if target.scored == "hidden" else torch.ones_like(owned)
        return POSITIONAL[target.score](prediction, z_y, scored)

    def _dense_matching(
        self, prediction: Float[Tensor, "n l d"], z_y: Float[Tensor, "n l d"], position: Int[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """Predicted patches against the same patches of their target view and those of all images of the global
        batch: some of each image, evenly spread from a start that its position in the run's order decides.
        Where a patch lies, the decoder knows from the views' geometry.
        """
        num_patches = prediction.shape[1]
        num = min(self.run.projection.dense_samples, num_patches)
        steps = torch.arange(num, device=position.device) * num_patches // num
        start = position * SCATTER % num_patches
        drawn = ((start[:, None] + steps) % num_patches)[..., None]
        pairs = (
            F.normalize(z.gather(1, drawn.expand(-1, -1, z.shape[-1])).flatten(0, 1).float(), dim=-1)
            for z in (prediction, z_y)
        )
        return matching_nats(*pairs, 1 / self.run.projection.temperature)

    def _project(self, tokens: Float[Tensor, "i l d"], owned: Bool[Tensor, "b l"]) -> Float[Tensor, "b p"]:
        """Prediction of every image's global features."""
        embedding = self.student.embed_tokens(self._per_image(tokens), owned)
        return self.predictor(self.student.projector(embedding))

    def _global_nats(
        self, target: Target, prediction: Float[Tensor, "n p"], z_y: Float[Tensor, "n p"]
    ) -> Float[Tensor, ""]:
        if target.keep == "decorrelation":
            return decorrelation_nats(prediction, z_y)
        if target.score == "boltzmann":
            pair = (F.normalize(z.float(), dim=-1) for z in (prediction, z_y))
            return matching_nats(*pair, 1 / self.run.projection.temperature)
        z_y = F.layer_norm(z_y, z_y.shape[-1:], eps=1e-6)
        everywhere = torch.ones(len(z_y), 1, dtype=torch.bool, device=z_y.device)
        return POSITIONAL[target.score](prediction[:, None], z_y[:, None], everywhere)

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
