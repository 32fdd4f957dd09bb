"""How many numbers does every parameter of a run hold? Counted on modules without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.models.backbone import GATHER_UNITS
from pretrain.pretrainer import Pretrainer

READ: dict[
    str, set[str]
] = {  # attributes of Towers that a teacher's target needs beside the encoder, by kind
    "dense": set(),
    "global": {"pool", "pool_norm", "norm", "projector"},
    "tags": {"tags"},
}
IN_PARTS = {"encoder", "pool", "text", "text_projection", "tags"}  # of Towers, called once a micro-batch


@dataclass(frozen=True)
class Sizes:
    """Elements of each trained parameter, by the part that owns it."""

    towers: tuple[int, ...]  # what the teacher averages as well
    decoder: tuple[int, ...]  # of patches, by the transformer, which every decoded target calls
    geometry: tuple[int, ...]  # those of the decoder whose input has no gradient
    rest: tuple[int, ...]  # linear decoders, predictor, temperature, mask
    taught: tuple[int, ...]  # of the towers, what a teacher's forward pass reads
    joint: tuple[
        int, ...
    ]  # of all, what sees the whole batch at once, also where the rest sees micro-batches
    largest_unit: int  # elements that ZeRO-3 gathers at once: a block, or the largest parameter

    @property
    def trained(self) -> tuple[int, ...]:
        return self.towers + self.decoder + self.rest

    @property
    def num_trained(self) -> int:
        return sum(self.trained)

    def longest_share(self, ranks: int) -> int:
        """Elements of the towers, the first of all, that the first rank has in its share under ZeRO-1 and 2."""
        return min(-(-self.num_trained // ranks), self.num_averaged)

    @property
    def num_averaged(self) -> int:
        return sum(self.towers)


def sizes_of(run: Run, facts: DataFacts) -> Sizes:
    """Of the model that `pretrain.train` builds; ValueError as it raises for a run that fits nothing."""
    with torch.device("meta"):
        model = Pretrainer(run, facts)
    kinds = {target.kind for target in model.targets.values() if target.encoder == "ema"}
    read = {"encoder"}.union(*(READ[kind] for kind in kinds)) if kinds else set()
    parts: dict[str, list[int]] = {
        name: [] for name in ("student", "decoder", "geometry", "rest", "taught", "joint")
    }
    for name, parameter in model.named_parameters():
        part, inside, *_ = *name.split("."), ""
        parts[part if part in ("student", "decoder") else "rest"].append(parameter.numel())
        if part == "student" and inside in read:
            parts["taught"].append(parameter.numel())
        if part == "decoder" and inside == "relative":
            parts["geometry"].append(parameter.numel())
        if part != "decoder" and inside not in IN_PARTS:
            parts["joint"].append(parameter.numel())
    units = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, GATHER_UNITS)]
    largest = max(units + [p.numel() for p in model.parameters()])
    return Sizes(*(tuple(part) for part in parts.values()), largest)


def assumed_facts(
    run: Run,
    categories: int = 1000,
    vocab: int = 30_522,
    tags: int = 8000,
    guide_width: int = 512,
    guide_codes: int = 8192,
) -> DataFacts:
    """What data and guide would tell, where there are none yet: of the kinds that the recipe's sources supervise."""
    given = {source.supervision for source in run.data.values()}
    return DataFacts(
        tuple(map(str, range(categories))) if "category" in given else (),
        vocab if "text" in given else 0,
        tuple(map(str, range(tags))) if "tags" in given else (),
        guide_width if run.objective.needs_guide else 0,
        guide_codes if run.objective.needs_guide else 0,
    )
