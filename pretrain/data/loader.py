"""Which batch does a rank get at a step?"""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader

from data_prep.schema import IMAGE_EXTENSIONS
from pretrain.config import Run
from pretrain.data.batch import MOST_TAGS, NO_TAG, Batch
from pretrain.data.decode import decode_image
from pretrain.data.faults import BadSample, DataError, Dropped, check_bad_share
from pretrain.data.mask import draw_mask
from pretrain.data.order import Order
from pretrain.data.sources import OpenSource, Sources, open_sources
from pretrain.data.text import choose_caption
from pretrain.data.views import two_views
from pretrain.facts import DataFacts

VERIFIED_BYTES = 2 * 2**30  # data sets up to this size are hashed at start, of larger ones the first shard
MAX_REPLACED = 100  # bad samples in a row of one source before the data counts as broken
MOST_UNTAGGED = 64  # images without any tag before that is told
MAX_DEATHS = 5  # of workers, before the machine counts as too small
STAGES = ("read", "labels", "decode", "views", "batch")  # of the work, in its order
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class Delivery(NamedTuple):
    """One batch, and what it took to make it."""

    batch: Batch
    dropped: tuple[Dropped, ...]
    seconds: dict[str, float]  # by stage, of the process that worked


def run_order(run: Run, sources: Sources) -> Order:
    """Which sample the run draws at every position of its order."""
    weights = [float(source.weight) for source in run.data.values()]
    return Order(run.seed, weights, [source.shards.shard_sizes for source in sources.opened], run.mixing)


class Steps:
    """step -> Delivery of one rank: a pure function of the run, the data and the step.

    Worker processes rebuild it from its arguments.
    """

    def __init__(self, run: Run, sources: Sources, rank: int, world: int) -> None:
        self._arguments = (run, sources, rank, world)
        self.run = run
        self.sources = sources
        self._rank = rank
        self._images = run.images_per_rank(world)
        self._order = run_order(run, sources)
        self._needs_other = run.objective.needs_other_view()
        self._seconds: dict[str, float] = {}

    def __reduce__(self) -> tuple:
        return Steps, self._arguments

    def __getitem__(self, step: int) -> Delivery:
        first = step * self.run.batch + self._rank * self._images
        positions = range(first, first + self._images)
        self._seconds = dict.fromkeys(STAGES, 0.0)
        dropped: list[Dropped] = []
        rows = [self._row(position, dropped) for position in positions]
        with self._during("batch"):
            fields = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            masks = [self._masks(position) for position in positions[:: self.run.objective.input.mixed]]
            batch = Batch(mask=torch.cat(masks), position=torch.tensor(positions), **fields)
        return Delivery(batch, tuple(dropped), self._seconds)

    @contextmanager
    def _during(self, stage: str) -> Iterator[None]:
        """Counts the time inside as that of a stage, also of a sample that turns out to be bad."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - begun

    def _row(self, position: int, dropped: list[Dropped]) -> dict[str, Tensor]:
        """What the batch holds of one image; bad samples are replaced by the next of the same source."""
        number, draw = self._order.draw(position)
        source = self.sources.opened[number]
        for replacement in range(MAX_REPLACED):
            pick = self._order.pick(number, draw + replacement)
            try:
                return self._sample_row(source, pick.shard, pick.index, position)
            except BadSample as error:
                shard = source.shards.manifest.shards[pick.shard].name
                dropped.append(Dropped(source.name, shard, pick.index, error.reason, str(error)))
        raise DataError(
            f"{MAX_REPLACED} samples in a row of source {source.name!r} cannot be used, the last: {dropped[-1]}; "
            f"run `python -m data_prep check {source.shards.folder}` and build the data set again"
        )

    def _sample_row(self, source: OpenSource, shard: int, index: int, position: int) -> dict[str, Tensor]:
        run = self.run
        with self._during("read"):
            _, members = source.shards.read(shard, index)
        encoded = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), None)
        if encoded is None:
            raise BadSample("no_image", f"the sample holds {sorted(members)}, none of {IMAGE_EXTENSIONS}")
        with self._during("labels"):
            category = source.category(members)
            tags = self._tags(source, members)
            tokens, token_mask = self._tokens(source, members, position)
        with self._during("decode"):
            image = decode_image(encoded)
        needs_other = self._needs_other[position % run.objective.input.mixed]
        with self._during("views"):
            views, boxes = two_views(image, run.views, _generator(run.seed, position, "views"), needs_other)
        return {
            "views": views,
            "boxes": boxes,
            "sizes": torch.tensor(image.shape[:2], dtype=torch.float32),
            "category": torch.tensor(category),
            "tokens": tokens,
            "token_mask": token_mask,
            "tags": tags,
            "has_tags": torch.tensor(source.gives_tags),
        }

    def _tags(self, source: OpenSource, members: Mapping[str, bytes]) -> Int[Tensor, " most"]:
        """Tags that are sure enough, the most confident first; as wide for every sample of the run."""
        told, most = source.tags(members), MOST_TAGS if self.sources.tags else 0
        sure = [number for number, confidence in told.items() if confidence >= self.run.tags.min_score][:most]
        return torch.tensor([*sure, *[NO_TAG] * (most - len(sure))], dtype=torch.long)

    def _tokens(
        self, source: OpenSource, members: Mapping[str, bytes], position: int
    ) -> tuple[Tensor, Tensor]:
        captions, length = self.sources.captions, self.run.text.length
        if captions is not None and source.gives_text:
            return captions.encode(choose_caption(members, _generator(self.run.seed, position, "caption")))
        padding = 0 if captions is None else captions.padding
        return torch.full((length,), padding), torch.zeros(length, dtype=torch.bool)

    def _masks(self, position: int) -> Bool[Tensor, "views g g"]:
        """The masks of the inputs that begin at `position`, one a view; all False where they hide nothing."""
        grid, shown = self.run.grid, self.run.objective.input
        if not shown.hides:
            return torch.zeros(shown.views, grid, grid, dtype=torch.bool)
        generator = _generator(self.run.seed, position, "mask")
        return torch.stack([draw_mask(grid, self.run.mask, generator) for _ in range(shown.views)])


class Loader:
    """Endless batches of one rank, from `start_step` on.

    (seed, position) alone decides sample, augmentation and mask: the global batch is the same for any number
    of ranks and workers, and a run resumes by its step. `workers` = 0 works in this process, more prefetch
    two batches each. Every bad sample becomes a line of JSON at the end of `dropped_to`, if that is given. At
    construction everything that can be wrong with recipe, folders and labels raises
    ValueError or FileNotFoundError; while iterating, more bad samples than run.max_bad raise DataError. Workers that
    die are replaced with a warning, and nothing is lost; the death after MAX_DEATHS raises DataError.
    """

    def __init__(
        self,
        run: Run,
        folders: Mapping[str, Path],
        tokenizer: Path | None,
        *,
        rank: int,
        world: int,
        workers: int = 0,
        start_step: int = 0,
        dropped_to: Path | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} must lie in [0, world={world})")
        run.images_per_rank(world)
        sources = open_sources(run, folders, tokenizer)
        for source in sources.opened:
            is_small = source.shards.num_bytes <= VERIFIED_BYTES
            source.shards.verify(len(source.shards.shard_sizes) if is_small else 1)
        captions = sources.captions
        sha256 = {f"data.{source.name}": source.shards.sha256 for source in sources.opened}
        if captions is not None:
            sha256["tokenizer"] = captions.sha256
        self.facts = DataFacts(
            categories=sources.categories,
            vocab_size=0 if captions is None else captions.vocab_size,
            tags=sources.tags,
            sha256=sha256,
        )
        self._steps = Steps(run, sources, rank, world)
        self.dropped: dict[str, int] = {}  # reason -> samples replaced so far on this rank
        self.seconds = dict.fromkeys(STAGES, 0.0)  # of work so far for this rank, of all its workers
        self.num_images = 0  # delivered on this rank
        self._dropped_to = dropped_to
        self._untagged: int | None = 0  # images so far; None once one had a tag, or it was told
        self._workers, self._next_step, self._deaths = workers, start_step, 0
        self._deliveries: Iterator[Delivery] | None = iter(_data_loader(self._steps, workers, start_step))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._deliveries is None:
            raise ValueError("the loader is closed; make a new one with start_step")
        delivery = self._deliver()
        self._next_step += 1
        self.num_images += len(delivery.batch.position)
        self._look_for_tags(delivery.batch)
        for stage, seconds in delivery.seconds.items():
            self.seconds[stage] += seconds
        if delivery.dropped:
            self._count(delivery.dropped)
        return delivery.batch

    def _look_for_tags(self, batch: Batch) -> None:
        """Warns once when none of the first images that should have tags has one: all would be negatives of all."""
        if self._untagged is None or not batch.has_tags.any():
            return
        if (batch.tags[batch.has_tags] != NO_TAG).any():
            self._untagged = None
            return
        self._untagged += int(batch.has_tags.sum())
        if self._untagged >= MOST_UNTAGGED:
            warnings.warn(
                f"none of the first {self._untagged} images has a tag of confidence {self._steps.run.tags.min_score} "
                "(tags.min_score) or more, so that each is a negative of every tag: lower it, or build with tags",
                stacklevel=3,
            )
            self._untagged = None

    def _deliver(self) -> Delivery:
        """The next step's batch; when a worker has died, all of them begin again at that step."""
        while True:
            try:
                return next(self._deliveries)
            except (RuntimeError, OSError, EOFError):  # torch's own, or of the memory that a worker shared
                dead = _dead_workers(self._deliveries)
                if not dead:
                    raise
            self._deaths += 1
            told = f"worker processes {dead} of the loader died at step {self._next_step}"
            if self._deaths > MAX_DEATHS:
                raise DataError(
                    f"{told}, for the {self._deaths}. time: if the system killed them for memory, lower --workers"
                )
            warnings.warn(f"{told}: new ones go on from there", stacklevel=3)
            self._deliveries = None  # ends the others
            self._deliveries = iter(_data_loader(self._steps, self._workers, self._next_step))

    def _count(self, dropped: tuple[Dropped, ...]) -> None:
        """Keeps and tells what was replaced; DataError when it is too much."""
        for sample in dropped:
            self.dropped[sample.reason] = self.dropped.get(sample.reason, 0) + 1
        if self._dropped_to is not None:
            with self._dropped_to.open("a") as file:
                file.writelines(json.dumps(sample._asdict()) + "\n" for sample in dropped)
        num_reads = self.num_images + sum(self.dropped.values())
        check_bad_share(self.dropped, num_reads, self._steps.run.max_bad, str(dropped[-1]))

    def close(self) -> None:
        """End the workers and close the shards."""
        self._deliveries = None  # the DataLoader's iterator joins its workers when it goes
        for source in self._steps.sources.opened:
            source.shards.close()


class _StepNumbers:
    """Sampler: every step from `start` on."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


def _data_loader(steps: Steps, workers: int, start_step: int) -> DataLoader:
    """torch's DataLoader with one whole batch an item; workers start from a clean process, because a fork
    of a trainer that runs threads (NCCL, gloo) may deadlock."""
    context = None
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    return DataLoader(
        steps,  # a map-style dataset is what has __getitem__
        sampler=_StepNumbers(start_step),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_start_worker,
        multiprocessing_context=context,
        pin_memory=torch.cuda.is_available(),
    )


def _dead_workers(deliveries: Iterator[Delivery]) -> list[int]:
    """Process numbers; a worker's death may be seen through its memory before the system tells of it."""
    workers = getattr(deliveries, "_workers", [])  # torch has no public name for them
    for _ in range(10):
        if dead := [worker.pid for worker in workers if not worker.is_alive()]:
            return dead
        time.sleep(0.1 * bool(workers))
    return []


def _unchanged(delivery: Delivery) -> Delivery:
    return delivery


def keep_memory() -> None:
    """Lets this process reuse the memory of images: fresh pages cost as much as decoding. glibc alone can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)  # bytes, the largest that glibc takes
        mallopt(M_TRIM_THRESHOLD, 2**28)


def _start_worker(worker: int) -> None:
    """One thread, an allocator that keeps its memory (page faults cost as much as decoding), and an end with
    the trainer: torch's own watchdog sees only the fork server, which outlives a trainer that was killed."""
    torch.set_num_threads(1)
    keep_memory()
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "only worker processes wait for the trainer's end"
    trainer.join()
    os._exit(1)


def _generator(seed: int, position: int, purpose: str) -> Random:
    """Random numbers of one purpose at one position of the run's order."""
    return Random(f"{seed}/{position}/{purpose}")
