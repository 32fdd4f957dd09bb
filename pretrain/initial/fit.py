"""Which tensor of a file becomes which of ours, and what of it fits nowhere?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from pretrain.initial.layouts import LAYOUTS, Layout
from pretrain.models.backbone import BACKBONES

ENCODER = "encoder."
TABLE = ".relative_position_bias_table"
OPTIONAL = {  # begin of ours -> why a file may lack all of it
    "encoder.heads.": "this layout ends with the maps of the stages, before tokens are made of them",
    "encoder.norm.": "running statistics of features, which only a run with backbone.token_norm='batch' keeps",
}
ABOVE = "above the backbone; --init-heads takes it"
NO_TOWER = "this run has no such tower"
MOST_TOLD = 3  # names in one message


@dataclass(frozen=True)
class Fit:
    """What becomes of every tensor of a file, and of every one of ours."""

    layout: str
    sources: dict[str, tuple[str, ...]]  # ours -> theirs, laid end to end
    resized: dict[str, str]  # ours -> how
    left: dict[str, str]  # theirs -> why it is left out
    kept: dict[str, str]  # ours -> why it stays as it is initialised
    tensors: Mapping[str, Tensor] = field(repr=False)  # theirs, made ready by the layout

    @property
    def taken(self) -> int:
        return sum(len(names) for names in self.sources.values())

    def __str__(self) -> str:
        return (
            f"{self.layout}: {self.taken} tensors taken, {len(self.resized)} resized, {len(self.left)} left out, "
            f"{len(self.kept)} of ours kept as initialised"
        )

    def told(self) -> list[str]:
        """One line for every reason."""
        lines = [f"{name} resized: {how}" for name, how in list(self.resized.items())[:MOST_TOLD]]
        for what, names in (("left out", self.left), ("kept as initialised", self.kept)):
            for why in dict.fromkeys(names.values()):
                some = [name for name in names if names[name] == why]
                more = f" and {len(some) - MOST_TOLD} more" if len(some) > MOST_TOLD else ""
                lines.append(f"{what}: {', '.join(some[:MOST_TOLD])}{more} ({why})")
        return lines


def fit(
    state: Mapping[str, Tensor], name: str, towers: nn.Module, family: str, heads: bool, place: str
) -> Fit:
    """How the tensors of a file, in layout `name`, become those of towers or of their `encoder` alone.

    Shapes alone are looked at.

    ValueError names what is missing, unexpected or of another shape.
    """
    layout = LAYOUTS[name]
    if layout.family not in (None, family):
        raise ValueError(
            f"{place} holds a backbone of the family {layout.family!r} ({name}), this run trains {family!r}: take "
            f"other weights, or a recipe whose backbone.family is {layout.family!r}"
        )
    try:
        state, ours = dict(layout.prepare(state)), towers.state_dict()
    except ValueError as error:
        raise ValueError(f"{place} ({name}): {error}") from error
    sources: dict[str, tuple[str, ...]] = {}
    kept, missing, above = {}, [], set()
    for our in ours:
        theirs = layout.sources(our)
        if not heads and not our.startswith(ENCODER):
            above |= set(theirs)
            kept[our] = ABOVE if set(theirs) & state.keys() else "above the backbone"
        elif theirs and all(their in state for their in theirs):
            sources[our] = theirs
        elif why := _may_lack(our, layout, state, ours):
            kept[our] = why
        else:
            missing.append((our, [their for their in theirs if their not in state]))
    used = {their for theirs in sources.values() for their in theirs}
    left = {their: why for their in state if their not in used and (why := _left(their, layout, above, ours))}
    unexpected = [their for their in state if their not in used and their not in left]
    resized, reshaped = {}, []
    for our, theirs in sources.items():
        there, here = _joined_shape([state[their] for their in theirs]), tuple(ours[our].shape)
        if there != here:
            how = _resize(our, there, here)
            (resized.__setitem__(our, how) if how else reshaped.append((our, there, here)))
    _require_none(place, name, family, missing, unexpected, reshaped)
    return Fit(name, sources, resized, left, kept, state)


@torch.no_grad()
def fill(towers: nn.Module, fitted: Fit) -> None:
    """Copies the tensors into towers, in float32; ValueError for one that is not finite or holds no floats."""
    own: dict[str, Any] = dict(towers.named_parameters()) | dict(towers.named_buffers())
    for our, theirs in fitted.sources.items():
        tensors = [fitted.tensors[their] for their in theirs]
        if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in tensors):
            raise ValueError(
                f"{theirs[0]} holds other than finite numbers ({tensors[0].dtype}): take other weights"
            )
        target = own[our]
        if our in fitted.resized:
            target.copy_(_resized(our, tensors[0].float(), towers))
            continue
        start = 0
        for tensor in tensors:
            target[start : start + len(tensor)].copy_(tensor) if target.ndim else target.copy_(tensor)
            start += len(tensor) if target.ndim else 0


def _may_lack(
    our: str, layout: Layout, state: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> str | None:
    """Why a file may lack one of ours: it lacks the whole module."""
    begin = next((start for start in OPTIONAL if our.startswith(start)), our.partition(".")[0] + ".")
    if begin == ENCODER or any(set(layout.sources(o)) & state.keys() for o in ours if o.startswith(begin)):
        return None
    return OPTIONAL.get(begin, "not in the file")


def _left(their: str, layout: Layout, above: set[str], ours: Mapping[str, Tensor]) -> str | None:
    if their in above:
        return ABOVE
    for pattern, why in layout.left.items():
        if re.match(pattern, their):
            return why
    if layout.family is None and not their.startswith(ENCODER):
        has_tower = any(our.partition(".")[0] == their.partition(".")[0] for our in ours)
        return None if has_tower else NO_TOWER
    return None


def _joined_shape(tensors: list[Tensor]) -> tuple[int, ...]:
    if len(tensors) == 1:
        return tuple(tensors[0].shape)
    return (sum(len(t) for t in tensors), *tensors[0].shape[1:])


def _resize(our: str, there: tuple[int, ...], here: tuple[int, ...]) -> str | None:
    """How a tensor of positions is brought to our size; None where it is none, or differs in more than that."""
    if our.endswith("vit.pos_embed") and len(there) == 3 and there[2] == here[2]:
        old, new = _side(there[1] - 1), _side(here[1] - 1)
        return f"{old} x {old} to {new} x {new} positions, bicubic with antialias" if old and new else None
    if our.endswith(TABLE) and len(there) == 2 and there[1] == here[1]:
        old, new = _side(there[0]), _side(here[0])
        return f"windows of {(old + 1) // 2} to {(new + 1) // 2} tokens" if old and new and old % 2 else None
    return None


def _side(count: int) -> int:
    """Of a square of so many; 0 where there is none."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def _resized(our: str, tensor: Tensor, towers: nn.Module) -> Tensor:
    """As timm does for its own models."""
    if our.endswith(TABLE):
        module: nn.Module = towers.get_submodule(our.removesuffix(TABLE))
        table = module.relative_position_bias_table
        return resize_rel_pos_bias_table(
            tensor, new_window_size=module.window_size, new_bias_shape=table.shape
        )
    count = dict(towers.named_parameters())[our].shape[1] - 1
    return resample_abs_pos_embed(tensor, [_side(count), _side(count)], num_prefix_tokens=1)


def _require_none(
    place: str,
    layout: str,
    family: str,
    missing: list[tuple[str, list[str]]],
    unexpected: list[str],
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """ValueError that names the first of each kind that fits nowhere."""
    told = []
    if missing:
        names = ", ".join(
            f"{theirs[0] if theirs else our} (our {our})" for our, theirs in missing[:MOST_TOLD]
        )
        told.append(f"{len(missing)} tensors are missing, such as {names}")
    if unexpected:
        told.append(f"{len(unexpected)} are unexpected, such as {', '.join(unexpected[:MOST_TOLD])}")
    if reshaped:
        shapes = ", ".join(f"{our} of {there} instead of {here}" for our, there, here in reshaped[:MOST_TOLD])
        told.append(f"{len(reshaped)} have another shape: {shapes}")
    if not told:
        return
    classes = [one for one in reshaped if one[0].startswith("category.")]
    if classes and len(classes) == len(reshaped) and not missing and not unexpected:
        _, there, here = classes[0]
        raise ValueError(
            f"{place} has a head of {there[0]} classes, the data of this run has {here[0]} categories: leave out "
            "--init-heads to start from the backbone alone, or give data with the same categories"
        )
    raise ValueError(
        f"{place} ({layout}) does not fit: {'; '.join(told)}. Every tensor must find its place: choose the backbone "
        f"that the file holds by --backbone.size (of {sorted(BACKBONES[family].sizes)}), for InternImage also "
        "--backbone.token_width, and the patch that it was trained with"
    )
