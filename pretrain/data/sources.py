"""Which data sets does a run draw from, and what do their labels mean to the model?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.labels import fill_prompt, tags_of
from data_prep.schema import TOKENIZER_FOLDER, Manifest
from pretrain.config import Run
from pretrain.data.batch import NO_CATEGORY
from pretrain.data.cache import HELD_WINDOWS, Cache
from pretrain.data.faults import BadSample
from pretrain.data.remote import RemoteFolder
from pretrain.data.shards import ALL, ShardFolder
from pretrain.data.text import Captions, captions_of
from pretrain.place import Place

MOST_OPEN = 512  # shards of all sources in a process: systems allow it 1,024 files in all

# supervision -> does a data set promise its labels, what they are, where they come from
NEEDS: dict[str, tuple[Callable[[Manifest], bool], tuple[str, str], str]] = {
    "category": (
        lambda manifest: manifest.has_category,
        ("categories", "a .cls a sample"),
        "build it from class folders",
    ),
    "text": (lambda manifest: manifest.has_text, ("captions", "a .txt a sample"), "build it with captions"),
    "tags": (
        lambda manifest: bool(manifest.tags),
        ("tags", "their names in its manifest"),
        "build it from scenes or class folders, an older one once more into an empty folder",
    ),
}


@dataclass(frozen=True)
class OpenSource:
    """One data set of the mixture, opened."""

    name: str  # on the command line
    shards: ShardFolder
    gives_text: bool
    prompts: tuple[str, ...]  # captions of its categories; empty where samples have their own
    category_ids: tuple[int, ...]  # number in the data set -> number in the run; empty without supervision
    tag_ids: Mapping[str, int]  # name -> number in the run; empty without supervision

    @property
    def gives_tags(self) -> bool:
        return bool(self.tag_ids)

    def category(self, members: Mapping[str, bytes]) -> int:
        """The run's category of a sample, NO_CATEGORY where this source gives none; raises BadSample."""
        if not self.category_ids:
            return NO_CATEGORY
        return self.category_ids[_category_number(members, len(self.category_ids))]

    def captions(self, members: Mapping[str, bytes]) -> list[str]:
        """What may be said of a sample of a source that gives text; raises BadSample."""
        if not self.prompts:
            return captions_of(members)
        categories = self.shards.manifest.categories
        category = categories[_category_number(members, len(categories))]
        return [fill_prompt(prompt, category) for prompt in self.prompts]

    def tags(self, members: Mapping[str, bytes]) -> dict[int, float]:
        """The run's number -> confidence in [0, 1], highest first; empty where this source gives none.

        Of a tag that is told twice the higher confidence counts. Raises BadSample.
        """
        if not self.gives_tags:
            return {}
        try:
            told = tags_of(json.loads(members.get("json", b"{}")), self.tag_ids)
        except (ValueError, RecursionError) as error:
            raise BadSample("bad_tags", f".json: {error}") from error
        ascending = sorted(told, key=lambda tag: tag[1])
        confidence = {self.tag_ids[name]: score for name, score in ascending}
        return dict(sorted(confidence.items(), key=lambda tag: (-tag[1], tag[0])))


@dataclass(frozen=True)
class Sources:
    """All data sets of a run, in the order of the recipe, and what they have in common."""

    opened: tuple[OpenSource, ...]
    categories: tuple[str, ...]  # of all sources with category supervision, first seen first
    tags: tuple[str, ...]  # of all sources with tags supervision, first seen first
    captions: Captions | None  # None without text supervision


def open_sources(
    run: Run, places: Mapping[str, Place], tokenizer: Path | None, checked: slice = ALL
) -> Sources:
    """The sources that `run.data` names, found in `places`; each must hold the labels asked of it.

    Of the shards of each those that `checked` selects must be there. Raises ValueError or FileNotFoundError: names
    that do not match, a broken or missing data set, missing categories, captions, tags or tokenizer, a `tokenizer`
    that nothing would use, or too little room for copies of what lies behind URLs.
    """
    _check_names(run, places)
    # A batch may lie across the border of two windows.
    open_shards = min(2 * run.mixing.window, max(MOST_OPEN // len(run.data), 1))
    shards = {name: ShardFolder(places[name], open_shards, checked) for name in run.data}
    remote = [folder for folder in shards.values() if folder.is_remote]
    if remote:
        Cache.of_environment().require_room(sum(_held_bytes(folder, run.mixing.window) for folder in remote))
    _check_supervision(run)
    told_by = {label: [n for n, source in run.data.items() if source.supervision == label] for label in NEEDS}
    for label, names in told_by.items():
        for name in names:
            wanted = "category" if run.data[name].prompts else label  # of which captions are made
            _check_labels(name, label, wanted, shards[name])
    categories = merge_names(shards[name].manifest.categories for name in told_by["category"])
    tags = merge_names(shards[name].manifest.tags for name in told_by["tags"])
    category_number = {category: i for i, category in enumerate(categories)}
    tag_number = {tag: i for i, tag in enumerate(tags)}
    opened = []
    for name in run.data:
        manifest = shards[name].manifest
        told_categories = manifest.categories if name in told_by["category"] else ()
        told_tags = manifest.tags if name in told_by["tags"] else ()
        opened.append(
            OpenSource(
                name=name,
                shards=shards[name],
                gives_text=name in told_by["text"],
                prompts=run.data[name].prompts,
                category_ids=tuple(category_number[category] for category in told_categories),
                tag_ids={tag: tag_number[tag] for tag in told_tags},
            )
        )
    captions = _captions(run, places, told_by["text"], tokenizer)
    return Sources(tuple(opened), categories, tags, captions)


def merge_names(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """One label space of several: equal names become one label, first seen first."""
    return tuple(dict.fromkeys(name for names in lists for name in names))


def _category_number(members: Mapping[str, bytes], num_categories: int) -> int:
    """The data set's number of a sample's category; raises BadSample."""
    if "cls" not in members:
        raise BadSample("no_category", "the sample has no .cls")
    try:
        number = int(members["cls"])
    except ValueError as error:
        raise BadSample("bad_category", f".cls holds {members['cls'][:20]!r}, no number") from error
    if not 0 <= number < num_categories:
        raise BadSample("bad_category", f".cls={number} must lie in [0, {num_categories}), the categories")
    return number


def _held_bytes(folder: ShardFolder, window: int) -> int:
    """The copies that must have room at once."""
    largest = max(shard.num_bytes for shard in folder.manifest.shards)
    return min(folder.num_bytes, HELD_WINDOWS * window * largest)


def tokenizer_beside(place: Place) -> Path:
    """Where the tokenizer of a data set lies, a copy of it where that is behind a URL; it may not exist."""
    if isinstance(place, Path):
        return place / TOKENIZER_FOLDER
    return RemoteFolder(place, Cache.of_environment()).copy_folder(TOKENIZER_FOLDER)


def tokenizer_folder(run: Run, places: Mapping[str, Place], named: Path | None) -> Path | None:
    """The named one, else that beside the shards of the first captioned source; None without captions."""
    captioned = [name for name, source in run.data.items() if source.supervision == "text"]
    if named is None and captioned and captioned[0] in places:
        return tokenizer_beside(places[captioned[0]])
    return named if captioned else None


def _check_names(run: Run, folders: Mapping[str, Place]) -> None:
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


def _check_labels(name: str, label: str, wanted: str, shards: ShardFolder) -> None:
    """ValueError where a data set does not promise the `wanted` labels, of which those of `label` are made."""
    is_there, what, remedy = NEEDS[wanted]
    if not is_there(shards.manifest):
        raise ValueError(
            f"{shards.place} has no {what[0]}, data.{name}.supervision={label!r} needs {what[1]}: {remedy}, or ask "
            "for 'none'"
        )


def _captions(
    run: Run, places: Mapping[str, Place], with_text: list[str], tokenizer: Path | None
) -> Captions | None:
    if with_text:
        return Captions(tokenizer or tokenizer_beside(places[with_text[0]]), run.text.length)
    if tokenizer is not None:
        raise ValueError(
            f"tokenizer={tokenizer} would be ignored, no source of recipe {run.name!r} has supervision="
            "'text': leave it out"
        )
    return None
