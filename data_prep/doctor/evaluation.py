"""Which pictures are in an evaluation set, a data set or a folder of images, and what do copies look like?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from data_prep.doctor.finished import BadDataSet, data_sets, manifest_at, require_shards
from data_prep.doctor.members import read_sample, samples_of
from data_prep.doctor.perceptual import grey_of, is_textured, views_of
from data_prep.doctor.pool import each
from data_prep.doctor.symmetric import View, symmetric_views
from data_prep.images import DAMAGED
from data_prep.places import Place
from data_prep.progress import progress_bar
from data_prep.schema import MANIFEST_NAME
from data_prep.sources.listing import is_image_name

AT_ONCE = 64  # files of a task


@dataclass(frozen=True)
class Picture:
    """Where an image of an evaluation set lies."""

    place: Place
    file: str  # a shard, or the image itself
    number: int  # in the shard; -1 for a file

    def __str__(self) -> str:
        return f"{self.place}/{self.file}" + (f" sample {self.number}" if self.number >= 0 else "")

    def read(self) -> bytes:
        """The encoded image."""
        if self.number < 0:
            return self.place.read(self.file)
        return read_sample(self.place, self.file, self.number)[0].content


@dataclass(frozen=True)
class Evaluation:
    """The pictures to look for, n of them, and the hashes of copies of them."""

    pictures: tuple[Picture, ...]  # n
    exact: np.ndarray  # uint64 [n], first 64 bits of the SHA-256 of each image
    hashes: np.ndarray  # uint64 [m], perceptual, of the pictures, cut and mirrored ones
    owners: np.ndarray  # int64 [m], the picture of each
    symmetric: tuple[tuple[int, View], ...]  # (picture, view) of those that are their own mirror image
    num_flat: int  # pictures without texture, found by their bytes alone
    unreadable: tuple[str, ...]  # files that are no images


@dataclass(frozen=True)
class _Task:
    place: Place
    files: tuple[str, ...]  # images, or one shard
    is_shard: bool


# of each readable image: file, number, exact hash, those of its views, symmetric views; then the names of others
_Result = tuple[list[tuple[str, int, int, np.ndarray, list[View]]], list[str]]


def read_evaluation(places: Sequence[Place], workers: int) -> Evaluation:
    """Hash every picture of some data sets and folders of images (with all folders below).

    Raises FileNotFoundError for a place without any. Memory: about 1,000 bytes a picture, 12,000 more for one that
    is its own mirror image.
    """
    tasks, total = [], 0
    for place in places:
        found, count = _tasks_of(place)
        tasks += found
        total += count
    pictures: list[Picture] = []
    exact: list[int] = []
    views: list[np.ndarray] = []
    symmetric: list[tuple[int, View]] = []
    unreadable: list[str] = []
    with (
        progress_bar(total, "evaluation sets", "image") as bar,
        closing(each(_hash_all, tasks, min(workers, len(tasks)), bar.update)) as results,
    ):
        ordered = sorted(results, key=lambda result: result[0])
    for number, (found, bad) in ordered:
        for file, inside, digest, hashes, mirrored in found:
            symmetric += [(len(pictures), view) for view in mirrored]
            pictures.append(Picture(tasks[number].place, file, inside))
            exact.append(digest)
            views.append(hashes)
        unreadable += [f"{tasks[number].place}/{name}" for name in bad]
    if not pictures:
        raise ValueError(
            f"none of the {len(unreadable)} files of {', '.join(map(str, places))} can be read as an image"
            f" ({unreadable[0]}): name another evaluation set"
        )
    table = np.stack(views)
    textured = is_textured(table) & is_textured(table[:, :1])
    num_flat = int((~textured[:, 0]).sum())
    owners = np.nonzero(textured)[0]
    exact_hashes = np.array(exact, np.uint64)
    return Evaluation(
        tuple(pictures), exact_hashes, table[textured], owners, tuple(symmetric), num_flat, tuple(unreadable)
    )


def _tasks_of(place: Place) -> tuple[list[_Task], int]:
    """What to read at a place, and how many images that is."""
    if place.local is not None and not place.local.is_dir():
        kind = "is a file" if place.local.exists() else "is no folder"
        raise NotADirectoryError(
            f"{place} {kind}: name a data set, or a folder of images; build a data set of a tar first"
        )
    if place.exists(MANIFEST_NAME) or any(
        place.child(name).exists(MANIFEST_NAME) for name in place.folders()
    ):
        tasks, total = [], 0
        for one in data_sets(place):
            manifest = manifest_at(one)
            require_shards(one, manifest)
            tasks += [_Task(one, (shard.name,), True) for shard in manifest.shards]
            total += manifest.num_samples
        return tasks, total
    tasks = list(_folders(place))
    if not tasks:
        raise FileNotFoundError(
            f"{place} holds no images: name a data set made by `data_prep build`, or a"
            " folder of JPEG, PNG or WebP files"
        )
    return tasks, sum(len(task.files) for task in tasks)


def _folders(place: Place) -> Iterator[_Task]:
    names = [name for name in place.names() if is_image_name(name)]
    for start in range(0, len(names), AT_ONCE):
        yield _Task(place, tuple(names[start : start + AT_ONCE]), False)
    for folder in place.folders():
        yield from _folders(place.child(folder))


def _hash_all(task: _Task, tick: Callable[[], None]) -> _Result:
    found, unreadable = [], []
    for name, number, content, digest in _images(task):
        try:
            pixels = grey_of(content)
            hashes = np.array(views_of(pixels), np.uint64)
            found.append((name, number, digest, hashes, symmetric_views(pixels)))
        except DAMAGED:
            unreadable.append(name if number < 0 else f"{name} sample {number}")
        tick()
    return found, unreadable


def _images(task: _Task) -> Iterator[tuple[str, int, bytes, int]]:
    """File, number in it, content and exact hash of every image."""
    if not task.is_shard:
        for name in task.files:
            content = task.place.read(name)
            yield name, -1, content, int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
        return
    with task.place.open(task.files[0]) as file:
        try:
            for number, (_, sample) in enumerate(samples_of(file)):
                digest = int(json.loads(sample[-1].content)["sha256"][:16], 16)
                yield task.files[0], number, sample[0].content, digest
        except (BadDataSet, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadDataSet(
                f"{task.place}/{task.files[0]}: {error}: run `python -m data_prep check {task.place}`"
            ) from error
