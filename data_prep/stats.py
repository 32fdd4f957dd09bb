"""What is in a data set? Counts of everything that its samples and their records hold, and its duplicates."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.doctor.duplicates import Duplicates, exact_duplicates, near_duplicates
from data_prep.doctor.finished import manifest_at, require_shards, starts_of
from data_prep.doctor.pool import each
from data_prep.doctor.summary import Summary, Task, Values, look
from data_prep.places import Place
from data_prep.progress import progress_bar
from data_prep.schema import Manifest, counts_by_reason

NUM_CHOSEN = 48  # random samples shown as pictures
MOST_LISTED = 100  # values of a histogram in the JSON record; the rest is summed up


@dataclass(frozen=True)
class Description:
    """What was found in one data set."""

    place: Place
    manifest: Manifest
    summary: Summary
    exact: Duplicates
    near: Duplicates | None  # None when it was not asked for
    distance: int  # bits, of `near`
    chosen: tuple[int, ...]  # numbers of random samples in the data set

    @property
    def num_classes(self) -> int:
        """Categories, or tags where there are none, that a sample has."""
        return len(self.summary.categories) or len(self.summary.tags)

    def locate(self, number: int) -> tuple[str, int]:
        """Shard of a sample of the data set, and its number in there."""
        starts = starts_of(self.manifest)
        at = bisect_right(starts, number) - 1
        return self.manifest.shards[at].name, number - starts[at]


def describe(place: Place, workers: int, languages: int = 5000, distance: int | None = 4) -> Description:
    """Read the records of every sample, and the pixels of those without a perceptual hash.

    `languages` captions or a few more are identified, spread over all shards; `distance` in bits makes two pictures
    alike, None looks for no such pairs (and computes no hash). Raises BadDataSet for a shard that is missing, cut or
    broken. Memory: 16 bytes a sample while reading, 90 a sample while duplicates are sought.
    """
    manifest = manifest_at(place)
    require_shards(place, manifest)
    quota = -(-languages // len(manifest.shards))
    tasks = (
        Task(place, shard.name, True, distance is not None, quota, NUM_CHOSEN) for shard in manifest.shards
    )
    starts = starts_of(manifest)
    exact = np.empty(manifest.num_samples, np.uint64)
    perceptual = np.empty(manifest.num_samples if distance is not None else 0, np.uint64)
    summary, chosen = Summary(), []
    with (
        progress_bar(manifest.num_samples, f"stats {place.name}", "sample") as bar,
        closing(each(look, tasks, min(workers, len(manifest.shards)), bar.update)) as results,
    ):
        for number, seen in results:
            _require_count(place, manifest, number, len(seen.sha256))
            span = slice(starts[number], starts[number + 1])
            exact[span] = seen.sha256
            if distance is not None:
                perceptual[span] = seen.phash
            summary.merge(seen.summary)
            chosen += [(order, starts[number] + inside) for order, inside in seen.chosen]
            chosen = sorted(chosen)[:NUM_CHOSEN]
    return Description(
        place,
        manifest,
        summary,
        exact_duplicates(exact),
        near_duplicates(perceptual, distance) if distance is not None else None,
        distance or 0,
        tuple(number for _, number in chosen),
    )


def _require_count(place: Place, manifest: Manifest, number: int, found: int) -> None:
    shard = manifest.shards[number]
    if found != shard.num_samples:
        raise ValueError(
            f"{place}/{shard.name} holds {found} samples, the manifest says {shard.num_samples}: run"
            f" `python -m data_prep check {place}`"
        )


def spread(counts: Mapping[Any, int]) -> dict[str, float]:
    """Least, median, mean and greatest of the numbers that a histogram counts; {} of nothing."""
    if not counts:
        return {}
    values = sorted(counts)
    weights = np.array([counts[value] for value in values], np.int64)
    total = int(weights.sum())
    middle = values[int(np.searchsorted(np.cumsum(weights), total / 2))]
    mean = float(np.dot(np.array(values, np.float64), weights) / total)
    return {"min": values[0], "median": middle, "mean": round(mean, 4), "max": values[-1]}


def as_record(described: Description) -> dict[str, Any]:
    """The description as JSON types; histograms list their MOST_LISTED largest values."""
    manifest, summary = described.manifest, described.summary
    numbers = (
        "widths",
        "heights",
        "image_bytes",
        "captions",
        "words",
        "characters",
        "objects",
        "tags_a_sample",
    )
    names = ("formats", "categories", "tags", "languages")
    return {
        "place": str(described.place),
        "name": manifest.name,
        "split": manifest.split,
        "num_samples": manifest.num_samples,
        "num_items": manifest.num_items,
        "num_shards": len(manifest.shards),
        "num_bytes": sum(shard.num_bytes for shard in manifest.shards),
        "num_categories": len(manifest.categories),
        "num_tags": len(manifest.tags),
        "dropped": dict(manifest.dropped),
        "dropped_from_shards": counts_by_reason(manifest),
        "builder": dict(manifest.builder),
        **{name: spread(getattr(summary, name)) for name in numbers},
        **{name: _largest(getattr(summary, name)) for name in names},
        "tag_scores": spread(summary.scores),
        "languages_are_estimated_from": summary.languages.total(),
        "fields": {name: _field(values) for name, values in sorted(summary.fields.items())},
        "exact_duplicates": _duplicates(described, described.exact),
        "near_duplicates": _duplicates(described, described.near) if described.near else None,
        "near_distance_bits": described.distance,
        "perceptual_hashes_computed": summary.num_computed,
    }


def _largest(counts: Counter[str]) -> dict[str, int]:
    """The most frequent values, with the sum of all others under "..."."""
    listed = dict(ordered(counts.items())[:MOST_LISTED])
    rest = counts.total() - sum(listed.values())
    return listed | ({"...": rest} if rest else {})


def ordered(items: Iterable[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Values by falling count, equal ones by name."""
    return sorted(items, key=lambda item: (-item[1], str(item[0])))


def _field(values: Values) -> dict[str, Any]:
    told: dict[str, Any] = {"samples": values.count, "missing": values.missing}
    if values.numbers:
        told["numbers"] = spread(values.numbers)
    if values.texts is None:
        told["texts"] = "many"
    elif values.texts:
        told["texts"] = dict(ordered(values.texts.items()))
    if values.other:
        told["lists or objects"] = values.other
    return told


def _duplicates(described: Description, found: Duplicates) -> dict[str, Any]:
    record = {name: value for name, value in asdict(found).items() if name != "examples"}
    places = [[list(described.locate(number)) for number in group] for group in found.examples]
    return record | {"num_extra": found.num_extra, "examples": places}
