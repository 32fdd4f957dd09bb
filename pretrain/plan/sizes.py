"""How many numbers does every parameter of a run hold? Counted on modules without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.models.backbone import GATHER_UNITS
from pretrain.pretrainer import Pretrainer


@dataclass(frozen=True)
class Sizes:
    """Elements of each trained parameter, by the part that owns it."""

    towers: tuple[int, ...]  # what the teacher averages as well
    decoder: tuple[int, ...]  # of patches, by the transformer, which every decoded target calls
    rest: tuple[int, ...]  # linear decoders, predictor, temperature, mask
    largest_unit: int  # elements that ZeRO-3 gathers at once: a block, or the largest parameter

    @property
    def trained(self) -> tuple[int, ...]:
        return self.towers + self.decoder + self.rest

    @property
    def num_trained(self) -> int:
        return sum(self.trained)

    @property
    def num_averaged(self) -> int:
        return sum(self.towers)


def sizes_of(run: Run, facts: DataFacts) -> Sizes:
    """Of the model that `pretrain.train` builds; ValueError as it raises for a run that fits nothing."""
    with torch.device("meta"):
        model = Pretrainer(run, facts)
    parts: dict[str, list[int]] = {"student": [], "decoder": [], "rest": []}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        parts[part if part in parts else "rest"].append(parameter.numel())
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
