"""What is the teacher worth while it is trained? kNN and zero-shot on some images, by all ranks together.

Each rank encodes a share of the images in as many forward passes as the others, since under ZeRO-3 a pass gathers
weights from all; the first rank judges. Nothing of the training moves: neither its data, nor a weight, nor a random
state. Data that fail while it trains are told in place of an accuracy, and it goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretrain import randomness
from pretrain.collectives import from_every_rank, gather_rows, on_every_rank, rank, world_size
from pretrain.config import Run
from pretrain.data.batch import NO_CATEGORY
from pretrain.data.faults import BadSample, DataError
from pretrain.data.text import Captions
from pretrain.evaluate import knn, zero_shot
from pretrain.evaluate.accuracy import score
from pretrain.evaluate.evidence import NotMeasured, Outcome, outcome_of
from pretrain.evaluate.features import Pictures
from pretrain.evaluate.sets import read_manifests
from pretrain.evaluate.splits import SPLITS, found_in
from pretrain.evaluate.templates import AUTO, choose_templates
from pretrain.facts import DataFacts
from pretrain.models.pixels import normalise
from pretrain.served import active_targets
from pretrain.towers import EMBEDDED

MOST_IMAGES = {"train": 2000, "heldout": 500}  # spread evenly over the data sets
IMAGES_AT_ONCE = 64
K = 20  # neighbours, fewer where there are fewer images
DIVERGED = ", which nothing is told by: the training has diverged, go back to an earlier checkpoint"
Seen = Mapping[str, Mapping[str, Tensor]]  # what `TeacherCheck.features` gives, by split


@runtime_checkable
class Taught(Protocol):
    """What is asked of an engine."""

    dtype: torch.dtype
    device: torch.device

    def ask_teacher(self, images: Tensor | None, *asked: Any) -> dict[str, Tensor]: ...


class TeacherCheck:
    """Measures the teacher of an engine on FOLDER/train and FOLDER/heldout (or what else it may be called).

    Raises FileNotFoundError and ValueError at once for data sets that cannot be evaluated on.
    """

    def __init__(self, run: Run, facts: DataFacts, folder: Path, tokenizer: Path | None) -> None:
        folders = {split: found_in(folder, split) for split in SPLITS}
        manifests = read_manifests(folders)
        self.categories = manifests["heldout"].categories
        if not self.categories:
            raise ValueError(
                f"{folder} has no categories to tell the teacher's images by: name another data set"
            )
        kinds = {target.kind for target in active_targets(run, facts).values()}
        self._run = run
        self._captions = None
        if tokenizer is not None and "text" in kinds & set(EMBEDDED):
            self._captions = Captions(tokenizer, run.text.length)
        self._pictures = {
            split: Pictures(
                folders[split], run.views.size, _share(manifests[split].num_samples, MOST_IMAGES[split])
            )
            for split in SPLITS
        }
        for split, pictures in self._pictures.items():
            _require_label(pictures, manifests[split].num_samples, MOST_IMAGES[split])

    def __call__(self, engine: Taught) -> dict[str, Any]:
        """Rows of the result by protocol, as `python -m pretrain.evaluate` gives them; none but on the first rank.

        `dropped` of a row counts what could not be read; its accuracy is None, with a `reason`, where the data allow
        none or the teacher's numbers are not finite. A collective call.
        """
        dropped: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
        try:
            with _undisturbed(), torch.no_grad():
                rows = self._rows(engine, dropped)
        except DataError as error:  # on all ranks
            names = ("knn",) if self._captions is None else ("knn", "zero_shot")
            rows = {name: {"accuracy": None, "reason": str(error)} for name in names}
        return {name: row | {"dropped": dropped} for name, row in rows.items()} if rank() == 0 else {}

    def _rows(self, engine: Taught, dropped: dict[str, dict[str, int]]) -> dict[str, Any]:
        """Without `dropped`, which is filled. DataError, on all ranks, for data that allow none."""
        seen = {}
        for split in SPLITS:
            seen[split], dropped[split] = self.features(engine, split)
        for split, values in seen.items():
            if not len(values["labels"]):
                folder, counts = self._pictures[split].shards.folder, _told(dropped[split])
                raise DataError(
                    f"none of the images of {folder} can be judged{counts}: `python -m data_prep check` says why"
                )
        classes = None if self._captions is None else self._classes(engine)
        if rank() > 0:
            return {}
        rows = {"knn": outcome_of(lambda: self._knn(seen)).record}
        if classes is not None:
            rows["zero_shot"] = outcome_of(lambda: self._zero_shot(seen, classes)).record
        return rows

    def _knn(self, seen: Seen) -> Outcome:
        _require_finite(seen)
        train, heldout = (seen[split] for split in SPLITS)
        k, num_categories = min(K, len(train["labels"])), len(self.categories)
        predicted = knn.votes(train["tokens"], train["labels"], heldout["tokens"], [k], num_categories)[k]
        return Outcome(score(predicted, heldout["labels"], num_categories) | {"k": k})

    def _zero_shot(self, seen: Seen, classes: Float[Tensor, "k e"]) -> Outcome:
        _require_finite(seen)
        if num_bad := _num_bad(classes):
            raise NotMeasured(
                f"the vectors of {num_bad} of {len(classes)} categories are not finite{DIVERGED}"
            )
        heldout = seen["heldout"]
        predicted = zero_shot.classify(heldout["projected"], classes)
        return Outcome(score(predicted, heldout["labels"], len(self.categories)))

    def features(self, engine: Taught, split: str) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Mean tokens [n, d], with text also image vectors [n, e], and labels [n] of the labelled readable images;
        how many images could not be read, by reason.

        Float32, on the CPU, on all ranks. A collective call. DataError, on all ranks, where one cannot read at all.
        """
        kinds = ("dense",) if self._captions is None else ("dense", "projected")
        found: dict[str, list[Tensor]] = {"tokens": [], "projected": []}
        labels, reasons = [], []
        for start in range(0, len(self._pictures[split]), IMAGES_AT_ONCE):
            try:  # before the pass, which all ranks must make or none
                views, some, unread = on_every_rank(partial(self._read, split, start), engine.device)
            except (OSError, ValueError) as error:
                raise DataError(str(error)) from error
            reasons += unread
            images = normalise(
                views.to(engine.device), self._run.views.mean, self._run.views.std, engine.dtype
            )
            said = engine.ask_teacher(images, kinds, False)
            found["tokens"].append(said["dense"].float().mean(dim=1))
            if "projected" in said:
                found["projected"].append(said["projected"].float())
            labels.append(some.to(engine.device))
        of_all = {name: gather_rows(torch.cat(parts)).cpu() for name, parts in found.items() if parts}
        of_all["labels"] = gather_rows(torch.cat(labels)).cpu()
        kept = of_all["labels"] != NO_CATEGORY
        of_reasons = Counter(from_every_rank(reasons, engine.device))
        return {name: values[kept] for name, values in of_all.items()}, dict(of_reasons)

    def _read(self, split: str, start: int) -> tuple[Tensor, Int[Tensor, " b"], list[str]]:
        """Views and labels of some of this rank's images, and why others cannot be read: they are black and have no
        label.
        """
        pictures = self._pictures[split]
        places = range(start, min(start + IMAGES_AT_ONCE, len(pictures)))
        read = [None if pictures.samples[i] is None else pictures[i] for i in places]
        black = torch.zeros(3, pictures.size, pictures.size, dtype=torch.uint8)
        seen = [black if p is None or p.view is None else p.view for p in read]
        labels = [NO_CATEGORY if p is None or p.view is None else p.label for p in read]
        unread = [p.reason for p in read if p is not None and p.view is None]
        return torch.stack(seen), torch.tensor(labels), unread

    def _classes(self, engine: Taught) -> Float[Tensor, "k e"]:
        assert self._captions is not None

        def embed(tokens: Int[Tensor, "n l"], token_mask: Bool[Tensor, "n l"]) -> Float[Tensor, "n e"]:
            texts = (tokens.to(engine.device), token_mask.to(engine.device))
            return engine.ask_teacher(None, ("texts",), False, texts)["texts"]

        _, templates, names = choose_templates(AUTO, self.categories)
        return zero_shot.class_vectors(names, self._captions.encode, embed, templates)


def _require_finite(seen: Seen) -> None:
    """NotMeasured for features, of any kind, that nothing can be compared with, as `not_finite` of an evidence."""
    for split, values in seen.items():
        kinds = [values[name].isfinite().all(dim=1) for name in ("tokens", "projected") if name in values]
        if num_bad := int((~torch.stack(kinds).all(dim=0)).sum()):
            raise NotMeasured(
                f"the features of {num_bad} of {len(values['labels'])} {split} images are not finite{DIVERGED}"
            )


def _num_bad(vectors: Float[Tensor, "n d"]) -> int:
    return int((~vectors.isfinite().all(dim=1)).sum())


def _require_label(pictures: Pictures, num_images: int, most: int) -> None:
    """ValueError unless one of the images that all ranks together read has a label; no image is decoded."""
    count = min(num_images, most)
    for place in range(count):
        with suppress(BadSample):
            if pictures.shards.sample(place * num_images // count).get("cls", b"").strip():
                return
    raise ValueError(
        f"none of the {count} images of {pictures.shards.folder} that the teacher would be judged by has a label: "
        "name another data set"
    )


def _told(dropped: Mapping[str, int]) -> str:
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()))
    return f" ({counts})" if counts else ""


def _share(num_images: int, most: int) -> list[int | None]:
    """Sample numbers that this rank reads of `most` spread over a data set, filled up to as many as others have."""
    count = min(num_images, most)
    own: list[int | None] = [i * num_images // count for i in range(rank(), count, world_size())]
    return own + [None] * (-(-count // world_size()) - len(own))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Global generators are afterwards as they were."""
    states = randomness.states()
    try:
        yield
    finally:
        randomness.restore(states)
