"""One batch in, nats by target out: the only forward of every objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from pretrain.balance import BalanceTracker, fork
from pretrain.collapse import Seen
from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.facts import DataFacts
from pretrain.inputs import Encoded, MaskPatch, enlarge, input_keys, owned_tokens
from pretrain.micro_batches import in_parts
from pretrain.models.decoder import DenseDecoder
from pretrain.models.pixels import normalise
from pretrain.models.temperature import Temperature
from pretrain.scoring import SCORES, Each, Step
from pretrain.served import active_targets
from pretrain.targets import TargetEncoders, encode
from pretrain.towers import Towers, projector


@dataclass(frozen=True)
class Losses:
    """What one forward gives. The mean over ranks of every scalar is its value over the global batch."""

    total: Float[Tensor, ""]  # to back-propagate; label losses already carry the balance weight
    nats: dict[str, Float[Tensor, ""]]  # by target, detached, float32, unweighted
    seen: dict[str, Seen]  # by target whose z_y could collapse, and `embedding`; detached
    each: dict[str, Each] = field(
        default_factory=dict
    )  # by target whose loss is a mean over images; detached


class Pretrainer(nn.Module):
    """The student with its decoders: predicts every target of the objective from one encoded input."""

    def __init__(self, run: Run, facts: DataFacts, micro_batches: int = 1) -> None:
        """`micro_batches`: parts of a rank's share that pass through encoders and decoders one after another."""
        super().__init__()
        self.run, self.micro_batches = run, micro_batches
        self.targets = active_targets(run, facts)
        self.student = Towers(run, facts)
        encoder, kinds = self.student.encoder, {target.kind for target in self.targets.values()}
        self.grid = run.views.size // encoder.stride  # tokens along one side
        self.has_summary = any(target.summary for target in self.targets.values())
        widths = {
            "pixels": 3 * encoder.stride**2,
            "dense": encoder.width,
            "guide": facts.guide_width,
            "codes": facts.guide_codes,
        }
        spatial = [target for target in self.targets.values() if target.kind in ("pixels", "dense")]
        by_decoder = {
            decoder: {target.output: widths[target.output] for target in spatial if target.decoder == decoder}
            for decoder in ("transformer", "linear")
        }
        if by_decoder["transformer"]:
            self.decoder = DenseDecoder(run.decoder, encoder.width, by_decoder["transformer"])
        self.linear = nn.ModuleDict({n: nn.Linear(encoder.width, w) for n, w in by_decoder["linear"].items()})
        if "global" in kinds:
            self.predictor = projector(run.projection.width, run.projection.hidden, run.projection.width)
        if "text" in kinds:
            self.temperature = Temperature(run.text.init_scale, run.text.max_scale)
        if run.objective.input.is_masked:
            self.mask_patch = MaskPatch(encoder.patch)

    def forward(self, batch: Batch, encoders: TargetEncoders, tracker: BalanceTracker) -> Losses:
        """One input for every group of `input.mixed` images, or two for every image, all targets scored.

        `encoders` make the targets that the student does not learn; `tracker` owns the weight of the label losses
        and sees both gradients that arrive at the encoder's output.
        """
        if self.run.objective.input.views == 2:
            batch = batch.both_ways()
        dtype = next(self.parameters()).dtype
        how = {"dtype": dtype, "grid": self.grid, "micro_batches": self.micro_batches}
        z_y = encode(self.run, self.targets, batch, encoders, **how)
        step = Step(self, self._encode(batch, tracker, dtype), z_y, tracker)
        scored = {name: SCORES[target.kind](step, name, target) for name, target in self.targets.items()}
        nats = {name: one.nats for name, one in scored.items()}
        seen = {name: one.seen for name, one in scored.items() if one.seen is not None}
        each = {name: one.each for name, one in scored.items() if one.each is not None}
        if {target.kind for target in self.targets.values()} & {"category", "text"}:
            seen["embedding"] = Seen(step.embedding("label").detach().float(), None)
        weight = tracker.weight
        total = sum(
            self.targets[name].weight * (weight * value if self.targets[name].group == "label" else value)
            for name, value in nats.items()
        )
        return Losses(total, {name: value.detach() for name, value in nats.items()}, seen, each)

    def _encode(self, batch: Batch, tracker: BalanceTracker, dtype: torch.dtype) -> Encoded:
        objective, patch = self.run.objective.input, self.run.mask.patch
        views = batch.views[:, 0].unflatten(0, (-1, objective.mixed))
        keys = input_keys(objective, batch, self.run.seed)
        mask = (batch.mask,) if objective.hides else ()
        features = in_parts(self.micro_batches, partial(self._features, dtype), views, keys, *mask)
        tokens = self.student.encoder.finish(features, self.has_summary)
        per_image = {
            group: branch.repeat_interleave(objective.mixed, dim=0)
            for group, branch in zip(("image", "label"), fork(tokens, tracker), strict=True)
        }
        return Encoded(
            batch,
            {group: branch[:, int(self.has_summary) :] for group, branch in per_image.items()},
            {group: branch[:, 0] for group, branch in per_image.items()} if self.has_summary else {},
            owned_tokens(objective, batch.mask, patch // self.student.encoder.stride),
        )

    def _features(
        self,
        dtype: torch.dtype,
        views: UInt8[Tensor, "i mixed 3 s s"],
        keys: Int[Tensor, " i"],
        mask: Bool[Tensor, "i g g"] | None = None,
    ) -> Float[Tensor, "i m d"]:
        """What the encoder makes of inputs of `mixed` views each, before any of them meets another."""
        images = normalise(views.flatten(0, 1), self.run.views.mean, self.run.views.std, dtype)
        if mask is not None:
            hidden = enlarge(mask, self.run.mask.patch)[:, None]
            is_masked = self.run.objective.input.is_masked
            images = (
                self.mask_patch(images, hidden)
                if is_masked
                else torch.where(hidden, images[1::2], images[0::2])
            )
        return self.student.encoder.features(images, keys)
