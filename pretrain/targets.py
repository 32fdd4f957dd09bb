"""What does the world outside the student say of a target: z_y?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.inputs import view_of
from pretrain.models.guides import Guide
from pretrain.models.pixels import normalise
from pretrain.objective import Target

# (images [n, 3, s, s], kinds, summary) -> by kind, as Towers.forward
TeacherCall = Callable[[Tensor, tuple[str, ...], bool], dict[str, Tensor]]


@dataclass(frozen=True)
class TargetEncoders:
    """Who makes what the student neither is given nor learns."""

    ema: TeacherCall
    guide: Guide | None = None  # frozen; None where no target needs it
    timed: Callable[[], AbstractContextManager] = nullcontext  # around all that they compute


@torch.no_grad()
def encode(
    run: Run,
    targets: Mapping[str, Target],
    batch: Batch,
    encoders: TargetEncoders,
    *,
    dtype: torch.dtype,
    grid: int,
    micro_batches: int = 1,
) -> dict[str, Tensor]:
    """z_y by name of target, for those that are pixels or made by teacher or guide; float32.

    pixels [n, l, 3 p p] of `grid` x `grid` patches; dense [n, l, d], normalised without affine unless the score is
    a cosine, with the summary as one more token in front where the target asks; global [n, p]; tags [n, k]; of a
    tokenizer codes [n, l], int. Teacher and guide see the views in `micro_batches` parts.
    """
    with encoders.timed():
        return _encode(run, targets, batch, encoders, dtype, grid, micro_batches)


def _encode(
    run: Run,
    targets: Mapping[str, Target],
    batch: Batch,
    encoders: TargetEncoders,
    dtype: torch.dtype,
    grid: int,
    micro_batches: int,
) -> dict[str, Tensor]:
    taught = {name: target for name, target in targets.items() if target.encoder == "ema"}
    found = _from_teacher(run, taught, batch, encoders.ema, dtype, micro_batches)
    for name, target in targets.items():
        view = view_of(run.objective, target, batch)
        if target.encoder == "frozen":
            features = torch.cat([encoders.guide(part, grid) for part in view.chunk(micro_batches)])
            found[name] = _features(target, features if target.summary else features[:, 1:])
        elif target.encoder == "tokenizer":
            found[name] = torch.cat([encoders.guide.codes(part, grid) for part in view.chunk(micro_batches)])
        elif target.kind == "pixels":
            found[name] = _pixels(run, target, view, grid)
    return found


def _from_teacher(
    run: Run,
    targets: Mapping[str, Target],
    batch: Batch,
    teacher: TeacherCall,
    dtype: torch.dtype,
    micro_batches: int,
) -> dict[str, Tensor]:
    """One call a part, in which every view that several targets share is encoded once."""
    if not targets:
        return {}
    kinds = tuple(dict.fromkeys(target.kind for target in targets.values()))
    has_summary = any(target.summary for target in targets.values())
    views = {_place(run, target): view_of(run.objective, target, batch) for target in targets.values()}
    parts = [
        teacher(normalise(part, run.views.mean, run.views.std, dtype), kinds, has_summary)
        for part in torch.cat(list(views.values())).chunk(micro_batches)
    ]
    said = {kind: torch.cat([part[kind] for part in parts]) for kind in kinds}
    sizes = [len(view) for view in views.values()]
    by_view = {
        kind: dict(zip(views, features.float().split(sizes), strict=True)) for kind, features in said.items()
    }
    found = {name: by_view[target.kind][_place(run, target)] for name, target in targets.items()}
    for name, target in targets.items():
        if target.kind == "dense":
            without = int(has_summary and not target.summary)
            found[name] = _features(target, found[name][:, without:])
    return found


def _place(run: Run, target: Target) -> tuple[str, tuple[int, ...]]:
    return target.view, run.objective.slots(target)


def _features(target: Target, features: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"]:
    """As they are where only their direction counts, else standardised."""
    return features.float() if target.score == "cosine" else _standardised(features)


def _standardised(features: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"]:
    return F.layer_norm(features.float(), features.shape[-1:], eps=1e-6)


def _pixels(run: Run, target: Target, view: Tensor, grid: int) -> Float[Tensor, "n l d"]:
    """Pixels of every patch, normalised as the encoder sees them, or standardised within the patch (MAE,
    arXiv 2111.06377).
    """
    images = normalise(view, run.views.mean, run.views.std, torch.float32)
    patch = run.views.size // grid
    pixels = F.unfold(images, patch, stride=patch).transpose(1, 2)
    return _standardised(pixels) if target.is_standardised else pixels


def positives(tags: Int[Tensor, "n most"], num_tags: int) -> Bool[Tensor, "n k"]:
    """Which tags each image has, from their numbers; negative numbers are padding."""
    padded = torch.where(tags < 0, num_tags, tags)
    has = torch.zeros(len(tags), num_tags + 1, dtype=torch.bool, device=tags.device)
    return has.scatter_(1, padded, True)[:, :num_tags]
