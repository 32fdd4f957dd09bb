"""Which training samples show a picture of an evaluation set? By their bytes, and by what they look like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from data_prep.doctor.evaluation import Evaluation
from data_prep.doctor.finished import manifest_at, require_shards
from data_prep.doctor.members import read_keys
from data_prep.doctor.near import Index, index_of, look_up
from data_prep.doctor.page import Page
from data_prep.doctor.perceptual import is_textured
from data_prep.doctor.pool import each
from data_prep.doctor.stats_page import picture_of
from data_prep.doctor.summary import Task, look
from data_prep.doctor.symmetric import find_symmetric, symmetric_of
from data_prep.places import Place
from data_prep.progress import progress_bar

MOST_SHOWN = 60  # pairs on the page, of which each distance has its share
EXACT = -1  # distance of samples that have the same bytes


@dataclass(frozen=True)
class Hit:
    """A training sample that shows a picture of an evaluation set."""

    place: Place  # of the training set
    shard: str
    number: int  # in the shard
    picture: int  # of the evaluation
    distance: int  # bits between their hashes (of symmetric ones: the firm half), EXACT for the same bytes


@dataclass(frozen=True)
class Leakage:
    """All that was found in one training set; of every sample the nearest picture."""

    place: Place
    num_samples: int
    num_flat: int  # training pictures without texture, compared by their bytes alone
    num_computed: int  # perceptual hashes that no record held
    hits: tuple[Hit, ...]


def find_leakage(place: Place, evaluation: Evaluation, distance: int, workers: int) -> Leakage:
    """Look every sample of a data set up among the pictures of an evaluation.

    Raises BadDataSet for a shard that is missing or broken. Memory: that of the evaluation and of what is found,
    and a shard's hashes; nothing grows with the training set.
    """
    manifest = manifest_at(place)
    require_shards(place, manifest)
    tasks = (Task(place, shard.name, with_summary=False, with_phash=True) for shard in manifest.shards)
    values, owners = _distinct(evaluation)
    index = index_of(values, distance, manifest.num_samples)
    symmetric = symmetric_of(list(evaluation.symmetric), distance, manifest.num_samples)
    exact = {int(value): number for number, value in enumerate(evaluation.exact)}
    known = np.unique(evaluation.exact)
    found: dict[int, list[Hit]] = {}
    num_flat = num_computed = 0
    with (
        progress_bar(manifest.num_samples, f"leakage {place.name}", "sample") as bar,
        closing(each(look, tasks, min(workers, len(manifest.shards)), bar.update)) as results,
    ):
        for number, seen in results:
            textured = is_textured(seen.phash)
            num_flat += int((~textured).sum())
            num_computed += seen.summary.num_computed
            name = manifest.shards[number].name
            nearest = find_symmetric(symmetric, seen.phash, place, name)
            for inside, found_at in _nearest(index, owners, seen.phash, textured).items():
                nearest[inside] = min(found_at, nearest.get(inside, found_at))
            for inside in np.flatnonzero(np.isin(seen.sha256, known)).tolist():
                nearest[inside] = (EXACT, exact[int(seen.sha256[inside])])
            found[number] = [
                Hit(place, name, inside, picture, bits) for inside, (bits, picture) in sorted(nearest.items())
            ]
    hits = tuple(hit for _, some in sorted(found.items()) for hit in some)
    return Leakage(place, manifest.num_samples, num_flat, num_computed, hits)


def _distinct(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """The different hashes of an evaluation, and one picture of each."""
    values, first = np.unique(evaluation.hashes, return_index=True)
    return values, evaluation.owners[first]


def _nearest(
    index: Index, owners: np.ndarray, hashes: np.ndarray, textured: np.ndarray
) -> dict[int, tuple[int, int]]:
    """Distance and picture of what is nearest to each sample, of those within the distance."""
    queries = np.flatnonzero(textured)
    left, right = look_up(index, hashes[queries])
    bits = np.bitwise_count(hashes[queries[left]] ^ index.values[right])
    nearest: dict[int, tuple[int, int]] = {}
    for sample, distance, picture in zip(
        queries[left].tolist(), bits.tolist(), owners[right].tolist(), strict=True
    ):
        nearest[sample] = min(nearest.get(sample, (distance, picture)), (distance, picture))
    return nearest


def by_distance(found: Sequence[Leakage]) -> dict[int, tuple[int, int]]:
    """Distance -> training samples and different pictures of the evaluation that it joins; EXACT first."""
    samples = Counter(hit.distance for one in found for hit in one.hits)
    return {
        distance: (
            count,
            len({hit.picture for one in found for hit in one.hits if hit.distance == distance}),
        )
        for distance, count in sorted(samples.items())
    }


def as_text(found: Sequence[Leakage], evaluation: Evaluation, distance: int) -> str:
    """What was found, by distance."""
    num_samples = sum(one.num_samples for one in found)
    hits = [hit for one in found for hit in one.hits]
    touched = len({hit.picture for hit in hits})
    lines = [
        f"{num_samples:,} training samples against {len(evaluation.pictures):,} pictures, within {distance} of 64"
        " bits (copies that are cut at the border or mirrored included):"
    ]
    for bits, (samples, pictures) in by_distance(found).items():
        name = "same bytes" if bits == EXACT else f"{bits} bits"
        lines.append(f"  {name:12} {samples:10,} samples show {pictures:,} pictures")
    lines.append(f"  in all       {len(hits):10,} samples show {touched:,} pictures")
    flat = sum(one.num_flat for one in found)
    if flat or evaluation.num_flat:
        lines.append(
            f"  {flat:,} flat training pictures and {evaluation.num_flat:,}"
            " of the evaluation were compared by bytes only"
        )
    if evaluation.unreadable:
        names = ", ".join(evaluation.unreadable[:3])
        lines.append(f"  {len(evaluation.unreadable):,} files could not be read as images: {names}")
    if computed := sum(one.num_computed for one in found):
        lines.append(f"  {computed:,} hashes were computed from pixels, no record held them")
    return "\n".join(lines)


def as_record(found: Sequence[Leakage], evaluation: Evaluation, distance: int) -> dict:
    """What was found as JSON types; `exclude` has the keys that training may leave out, by data set."""
    keys = {hit: key for one in found for hit, key in _keys(one)}
    return {
        "distance_bits": distance,
        "num_samples": sum(one.num_samples for one in found),
        "num_pictures": len(evaluation.pictures),
        "unreadable": list(evaluation.unreadable),
        "by_distance": {
            "same bytes" if bits == EXACT else str(bits): {"samples": samples, "pictures": pictures}
            for bits, (samples, pictures) in by_distance(found).items()
        },
        "exclude": {str(one.place): [keys[hit] for hit in one.hits] for one in found},
        "hits": [
            {
                "data_set": str(hit.place),
                "shard": hit.shard,
                "index": hit.number,
                "key": keys[hit],
                "distance_bits": max(0, hit.distance),
                "is_same_bytes": hit.distance == EXACT,
                "picture": str(evaluation.pictures[hit.picture]),
            }
            for one in found
            for hit in one.hits
        ],
    }


def _keys(found: Leakage) -> Iterator[tuple[Hit, str]]:
    for shard, group in groupby(found.hits, key=lambda hit: hit.shard):
        hits = list(group)
        yield from zip(hits, read_keys(found.place, shard, [hit.number for hit in hits]), strict=True)


def leakage_page(found: Sequence[Leakage], evaluation: Evaluation, distance: int) -> str:
    """A self-contained HTML file: pairs side by side, of every distance some."""
    page = Page("Training samples that show pictures of the evaluation sets")
    page.text(as_text(found, evaluation, distance))
    by_bits: dict[int, list[Hit]] = {}
    for one in found:
        for hit in one.hits:
            by_bits.setdefault(hit.distance, []).append(hit)
    share = MOST_SHOWN // max(1, len(by_bits))
    for bits, hits in sorted(by_bits.items()):
        page.heading(f"{'The same bytes' if bits == EXACT else f'{bits} bits apart'}: {len(hits):,}")
        page.groups([_pair(hit, evaluation) for hit in hits[: max(1, share)]])
    return page.html()


def _pair(hit: Hit, evaluation: Evaluation) -> list[tuple[bytes, str, str]]:
    picture = evaluation.pictures[hit.picture]
    return [
        picture_of(hit.place, hit.shard, hit.number),
        (picture.read(), "evaluation", f"{picture.file} {picture.number if picture.number >= 0 else ''}"),
    ]
