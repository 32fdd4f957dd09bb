"""Which batches does a rank get, from which data, and what had to be left out of them?"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from data_prep.schema import WHOLE_SHARD
from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.data.device import finish
from pretrain.data.drops import Drops
from pretrain.data.faults import BadSample, DataError, Dropped, NoneUsable
from pretrain.data.left_out import after_kept, next_kept
from pretrain.data.memory import require_memory
from pretrain.data.shards import ShardFolder
from pretrain.data.sources import Sources, open_sources
from pretrain.data.steps import STAGES, Delivery, Steps
from pretrain.data.told import Teller
from pretrain.data.verified import Verifier, Watched
from pretrain.data.workers import Made
from pretrain.facts import DataFacts
from pretrain.place import Place

VERIFIED_BYTES = 2 * 2**30  # data sets up to this size are hashed at start, of larger ones the first shard
VERIFY_RATE = 2**28  # bytes a second that all ranks together hash of the rest, while they train
MOST_UNTAGGED = 64  # images without any tag before that is told


class Loader:
    """Endless batches of one rank: those after the first `start_step`, where those in `left_out` do not count.

    (seed, position) alone decides sample, augmentation and mask: the global batch is the same for any number
    of ranks and workers, and a run resumes by its step and by the numbers of the batches that it left out.
    `workers` = 0 works in this process, more prefetch two batches each; what the recipe leaves to the device is done
    on `device` as a batch is taken, and batches lie there then. Every bad sample is listed once in `dropped_to`,
    if that is given (drop_list.py); lost shards and, now and then, bad samples are told on the console (told.py).
    At construction everything that can be wrong with recipe, folders and labels raises ValueError or
    FileNotFoundError; while iterating, more bad samples than run.max_bad raise DataError.
    Workers that die are replaced with a warning, and nothing is lost; too many deaths raise DataError.
    """

    def __init__(
        self,
        run: Run,
        folders: Mapping[str, Place],
        tokenizer: Path | None,
        *,
        rank: int,
        world: int,
        workers: int = 0,
        start_step: int = 0,
        left_out: Collection[int] = frozenset(),
        dropped_to: Path | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008  a value
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} must lie in [0, world={world})")
        require_memory(run, world, workers)
        self._left_out = frozenset(left_out)
        start_step = after_kept(start_step, self._left_out)
        ours = slice(rank, None, world)  # each rank looks at its part of the shards
        sources = open_sources(run, folders, tokenizer, slice(0) if start_step else ours)
        later, hashed, self._changed = _verified(sources, ours, is_resumed=bool(start_step))
        captions = sources.captions
        sha256 = {f"data.{source.name}": source.shards.sha256 for source in sources.opened}
        if captions is not None:
            sha256["tokenizer"] = captions.sha256
        self.facts = DataFacts(
            categories=sources.categories,
            vocab_size=0 if captions is None else captions.vocab_size,
            tags=sources.tags,
            sha256=sha256,
            num_samples={source.name: source.shards.manifest.num_samples for source in sources.opened},
        )
        self._steps = Steps(run, sources, rank, world)
        self._device = device
        self._verifier = Verifier(later, VERIFY_RATE / world, hashed)
        opened = {source.name: source.shards for source in sources.opened}
        manifests = {name: shards.manifest for name, shards in opened.items()}
        self._drops = Drops(
            dropped_to, start_step, manifests, lambda source, shard: opened[source].is_whole(shard), rank
        )
        self._teller = Teller(rank)
        self._is_begun = False
        self.num_captions = self.num_tokens = 0  # delivered on this rank
        self.num_cut = 0  # of these captions, those longer than run.text.length
        self.seconds = dict.fromkeys(STAGES, 0.0)  # of work so far for this rank, of all its workers
        self.num_images = 0  # delivered on this rank
        self._untagged: int | None = 0  # images so far; None once one had a tag, or it was told
        self._next_step = start_step
        self._made: Made | None = Made(self._steps, workers, start_step, self._left_out)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._made is None:
            raise ValueError("the loader is closed; make a new one with start_step")
        if not self._is_begun:
            self._drops.begin()
            self._is_begun = True
            for changed in self._changed:
                self._count([changed], self._next_step - 1)
        try:
            delivery = next(self._made)
            if delivery.unfinished is not None:
                delivery = self._finished(delivery)
        except NoneUsable as error:  # the run ends, and what it ends by is listed
            self._drops.add(self._next_step, error.tried)
            raise
        number, self._next_step = self._next_step, next_kept(self._next_step + 1, self._left_out)
        self.num_images += delivery.num_images
        self.num_captions += delivery.num_captions
        self.num_tokens += delivery.num_tokens
        self.num_cut += delivery.num_cut
        self._look_for_tags(delivery)
        for stage, seconds in delivery.seconds.items():
            self.seconds[stage] += seconds
        if delivery.dropped:
            self._teller.tell(number, delivery.dropped)
            self._count(delivery.dropped, number)
        while self._verifier.changed:
            source, shard, message = self._verifier.changed.pop()
            warnings.warn(f"{message} (its samples are used as they are)", stacklevel=2)
            self._count([Dropped(source, shard.name, WHOLE_SHARD, "changed_shard", message)], number)
        return delivery.batch

    def _finished(self, delivery: Delivery) -> Delivery:
        """With the views that the device had to make; a file that no decoder takes is replaced by another sample."""
        views = self._steps.run.views
        try:
            batch = finish(delivery.batch, delivery.unfinished, views, self._device)
        except BadSample:
            delivery = self._steps.decoded_here()[self._next_step]
            batch = finish(delivery.batch, delivery.unfinished, views, self._device)
        return delivery._replace(batch=batch)

    def _look_for_tags(self, delivery: Delivery) -> None:
        """Warns once when none of the first images that should have tags has one: all would be negatives of all."""
        if self._untagged is None or not delivery.num_taggable:
            return
        if delivery.num_tagged:
            self._untagged = None
            return
        self._untagged += delivery.num_taggable
        if self._untagged >= MOST_UNTAGGED:
            warnings.warn(
                f"none of the first {self._untagged} images has a tag of confidence {self._steps.run.tags.min_score} "
                "(tags.min_score) or more, so that each is a negative of every tag: lower it, or build with tags",
                stacklevel=3,
            )
            self._untagged = None

    @property
    def cycle(self) -> torch.Tensor:
        """Number of the source, as in the recipe, at every position of the run's order, repeated for ever; [c]."""
        return torch.from_numpy(self._steps.order.slots)

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each source, by all ranks, up to the last batch that was delivered; left out ones count too."""
        order, opened = self._steps.order, self._steps.sources.opened
        drawn = order.drawn(self._next_step * self._steps.run.batch)
        return {source.name: done / len(source.shards) for source, done in zip(opened, drawn, strict=True)}

    @property
    def dropped(self) -> dict[str, int]:
        """ "source: reason" -> samples replaced so far on this rank, also before a resume."""
        return self._drops.counts

    def _count(self, dropped: Sequence[Dropped], number: int) -> None:
        """Keeps and tells what was replaced in this batch; DataError when it is too much."""
        self._drops.add(number, dropped)
        self.require_few(self._steps.run.max_bad)

    def require_few(self, limit: float) -> None:
        """DataError when what was replaced so far is more than run.max_bad=`limit` would let pass."""
        self._drops.check(self.num_images, limit)

    @property
    def captions(self) -> dict[str, int]:
        """How many were delivered on this rank, with how many tokens, and how many of them were cut."""
        counts = {"delivered": self.num_captions, "tokens": self.num_tokens, "cut": self.num_cut}
        return counts if self.num_captions else {}

    def samples(self, positions: Sequence[int]) -> list[dict[str, object]]:
        """Where the samples at these positions of the run's order lie: source, shard, index and key there.

        The key is None of one that cannot be read, for which another one of its source stood in, and of one whose
        shard is not on this machine: no store is asked, which might fail.
        """
        found = []
        for position in positions:
            pick = self._steps.pick(position)
            source = self._steps.sources.opened[pick.source]
            key = None
            with suppress(BadSample, DataError, OSError):
                if source.shards.is_here(pick.shard):
                    key, _ = source.shards.read(pick.shard, pick.index, is_patient=False)
            shard = source.shards.manifest.shards[pick.shard].name
            place = {"source": source.name, "shard": shard, "index": pick.index, "key": key}
            found.append({"position": position, **place})
        return found

    def close(self) -> None:
        """End the workers and close the shards."""
        if self._made is not None:
            self._made.close()
        self._made = None
        self._verifier.close()
        self._drops.close()
        for source in self._steps.sources.opened:
            source.shards.close()


def _verified(
    sources: Sources, ours: slice, is_resumed: bool
) -> tuple[list[Watched], list[Watched], list[Dropped]]:
    """Looks at our shards, as a start must: those that are to be hashed later, that were, and that changed.

    A run that begins raises what is wrong with a shard; one that goes on warns of it.
    """
    later, hashed, changed = [], [], []
    for source in sources.opened:
        shards = source.shards
        problems: list[Exception] = list(shards.problems(ours)) if is_resumed else []  # else all are there
        if not shards.is_remote:  # hashed as it is copied
            (now, rest), found = _when_hashed(shards, ours), []
            if not is_resumed:
                shards.verify(now)
            else:
                found = list(shards.changed(now))
                changed += [
                    Dropped(source.name, shard.name, WHOLE_SHARD, "changed_shard", str(error))
                    for shard, error in found
                ]
                problems += [error for _, error in found]
            every = shards.manifest.shards
            told = [shard for shard, _ in found]
            later += [(shards.folder, source.name, every[number]) for number in rest]
            hashed += [(shards.folder, source.name, every[n]) for n in now if every[n] not in told]
        _tell(problems)
    return later, hashed, changed


def _when_hashed(shards: ShardFolder, ours: slice) -> tuple[range, range]:
    """Which of our shards are hashed before the first step, and which beside the training."""
    numbers = range(len(shards.shard_sizes))[ours]
    num_now = len(numbers) if shards.num_bytes <= VERIFIED_BYTES else 1
    return numbers[:num_now], numbers[num_now:]


def _tell(problems: Sequence[Exception]) -> None:
    """Warns of shards that a run had when it began: it goes on, and their samples are replaced and counted."""
    if problems:
        warnings.warn(
            f"{problems[0]} ({len(problems)} such shards; what cannot be read is replaced, what changed is "
            "used as it is)",
            stacklevel=3,
        )
