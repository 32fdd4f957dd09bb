"""Which data sets does a run draw from, and what do their labels mean to the model?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.schema import TOKENIZER_FOLDER
from pretrain.config import Run
from pretrain.data.batch import NO_CATEGORY
from pretrain.data.faults import BadSample
from pretrain.data.shards import ShardFolder
from pretrain.data.text import Captions


@dataclass(frozen=True)
class OpenSource:
    """One data set of the mixture, opened."""

    name: str  # on the command line
    shards: ShardFolder
    gives_text: bool
    category_ids: tuple[int, ...]  # number in the data set -> number in the run; empty without supervision

    def category(self, members: Mapping[str, bytes]) -> int:
        """The run's category of a sample, NO_CATEGORY where this source gives none; raises BadSample."""
        if not self.category_ids:
            return NO_CATEGORY
        if "cls" not in members:
            raise BadSample("no_category", "the sample has no .cls")
        try:
            number = int(members["cls"])
        except ValueError as error:
            raise BadSample("bad_category", f".cls holds {members['cls'][:20]!r}, no number") from error
        if not 0 <= number < len(self.category_ids):
            raise BadSample(
                "bad_category",
                f".cls={number} must lie in [0, {len(self.category_ids)}), the categories",
            )
        return self.category_ids[number]


@dataclass(frozen=True)
class Sources:
    """All data sets of a run, in the order of the recipe, and what they have in common."""

    opened: tuple[OpenSource, ...]
    categories: tuple[str, ...]  # of all labelled sources, first seen first
    captions: Captions | None  # None without text supervision


def open_sources(run: Run, folders: Mapping[str, Path], tokenizer: Path | None) -> Sources:
    """The sources that `run.data` names, found in `folders`; each must hold the labels asked of it.

    Raises ValueError or FileNotFoundError: names that do not match, a broken or missing data set, missing
    categories, captions or tokenizer, or a `tokenizer` that nothing would use.
    """
    _check_names(run, folders)
    shards = {name: ShardFolder(folders[name]) for name in run.data}
    _check_supervision(run)
    labelled = [name for name, source in run.data.items() if source.supervision == "category"]
    with_text = [name for name, source in run.data.items() if source.supervision == "text"]
    for name in labelled:
        if not shards[name].manifest.has_category:
            raise ValueError(
                f"{folders[name]} has no categories, data.{name}.supervision='category' needs a .cls a "
                "sample: build it from class folders, or ask for 'text' or 'none'"
            )
    for name in with_text:
        if not shards[name].manifest.has_text:
            raise ValueError(
                f"{folders[name]} has no captions, data.{name}.supervision='text' needs a .txt a sample: "
                "build it with captions, or ask for 'category' or 'none'"
            )
    categories = merge_names(shards[name].manifest.categories for name in labelled)
    number = {category: i for i, category in enumerate(categories)}
    opened = tuple(
        OpenSource(
            name=name,
            shards=shards[name],
            gives_text=name in with_text,
            category_ids=tuple(number[c] for c in shards[name].manifest.categories)
            if name in labelled
            else (),
        )
        for name in run.data
    )
    return Sources(opened, categories, _captions(run, folders, with_text, tokenizer))


def merge_names(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """One label space of several: equal names become one category, first seen first."""
    return tuple(dict.fromkeys(name for names in lists for name in names))


def _check_names(run: Run, folders: Mapping[str, Path]) -> None:
    if missing := sorted(run.data.keys() - folders.keys()):
        raise ValueError(
            f"recipe {run.name!r} draws from {missing}, which have no folder: add "
            + " ".join(f"{name}=DIR" for name in missing)
            + " to --data"
        )
    if unknown := sorted(folders.keys() - run.data.keys()):
        raise ValueError(
            f"--data names {unknown}, recipe {run.name!r} draws from {sorted(run.data)} only: "
            "leave them out or add them to the recipe's data"
        )


def _check_supervision(run: Run) -> None:
    """ValueError for labels that would be read and then ignored."""
    kinds = {target.kind for target in run.objective.targets.values()}
    for name, source in run.data.items():
        if source.supervision not in (*kinds, "none"):
            raise ValueError(
                f"data.{name}.supervision={source.supervision!r} would be ignored, recipe {run.name!r} predicts "
                f"{sorted(kinds)} only: ask for 'none', or take an objective with that target"
            )


def _captions(
    run: Run, folders: Mapping[str, Path], with_text: list[str], tokenizer: Path | None
) -> Captions | None:
    if with_text:
        return Captions(tokenizer or folders[with_text[0]] / TOKENIZER_FOLDER, run.text.length)
    if tokenizer is not None:
        raise ValueError(
            f"tokenizer={tokenizer} would be ignored, no source of recipe {run.name!r} has supervision="
            "'text': leave it out"
        )
    return None
