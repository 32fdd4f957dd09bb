"""Which protocols are asked for? Without torch, so that what is asked wrongly is told at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.evaluate.fine_tune_recipes import FROZEN, FineTune
from pretrain.evaluate.rows import ALL, DEFAULT, MOST_IMAGES, PROBES, tuned_row
from pretrain.evaluate.templates import AUTO, check_templates


@dataclass(frozen=True)
class Training:
    """A row of the result that costs a training on images."""

    row: str
    recipe: FineTune
    share: int | None = None  # per cent of the labels, drawn several times; None: all of them


@dataclass(frozen=True)
class Protocols:
    """What is measured, and how."""

    probes: tuple[str, ...] = DEFAULT  # or (ALL,)
    ks: tuple[int, ...] = (20, 10, 200)  # neighbours of kNN; the first stands in the table
    templates: str = AUTO  # of zero-shot classification
    retrieval_images: int = MOST_IMAGES  # held-out images that compete at most
    frozen: tuple[str, ...] = ()  # heads of FROZEN, each of which costs a training on the frozen encoder
    fine_tune: FineTune | None = None  # None: not fine-tuned, which costs a training
    fine_tune_few: Mapping[int, FineTune] = field(default_factory=dict)  # by SHARES of the labels
    fine_tune_draws: int = 3  # of few labels, each of which costs a training
    states: Path | None = None  # folder from which an interrupted fine-tuning goes on; None: it begins anew
    workers: int = 0  # processes that decode images; 0: this one

    def __post_init__(self) -> None:
        if self.probes == (ALL,):
            object.__setattr__(self, "probes", tuple(PROBES))
        if unknown := [name for name in self.probes if name not in PROBES]:
            raise ValueError(f"probes {unknown} are unknown; choose from {[*PROBES, *FROZEN, ALL]}")
        if unknown := [name for name in self.frozen if name not in FROZEN]:
            raise ValueError(f"heads {unknown} are unknown; choose from {[*FROZEN]}")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"--k {self.ks} must be positive numbers of neighbours, such as 20,10,200")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers} must not be negative: 0 decodes in this process")
        if self.retrieval_images < 2:
            raise ValueError(
                f"--retrieval-images {self.retrieval_images} must be 2 or more images that compete, such as 5000"
            )
        check_templates(self.templates)

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of what is measured, as they stand in the result."""
        return (*self.probes, *(training.row for training in self.trainings))

    @property
    def trainings(self) -> list[Training]:
        """What is trained on images, in the order of the result."""
        found = [Training(name, FROZEN[name]) for name in self.frozen]
        if self.fine_tune is not None:
            found.append(Training("fine_tune", self.fine_tune))
        few = self.fine_tune_few.items()
        return found + [Training(tuned_row(share), recipe, share) for share, recipe in few]
