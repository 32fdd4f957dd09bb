"""What does a rank get at a step? A pure function of run, data and step, which any process computes alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from data_prep.schema import IMAGE_EXTENSIONS
from pretrain.config import Run
from pretrain.data.batch import MOST_TAGS, NO_TAG, Batch
from pretrain.data.colour import Change
from pretrain.data.decode import decode_image, plain_jpeg_size
from pretrain.data.device import Unfinished, can_cut
from pretrain.data.faults import BadSample, Dropped, NoneUsable
from pretrain.data.mask import draw_mask
from pretrain.data.order import Order, Pick
from pretrain.data.room import Rooms, room_for
from pretrain.data.sources import OpenSource, Sources
from pretrain.data.text import Tokens
from pretrain.data.views import draw_views, make_views

MAX_TRIED = 32  # samples of a source for one position before the data counts as broken
STAGES = ("read", "labels", "decode", "views", "batch")  # of the work, in its order


class Delivery(NamedTuple):
    """One batch, and what it took to make it."""

    batch: Batch
    unfinished: Unfinished | None  # None where the views are as training sees them
    dropped: tuple[Dropped, ...]
    num_images: int
    num_taggable: int  # of sources that tell tags
    num_tagged: int  # with one that is sure enough
    num_captions: int
    num_tokens: int  # of all captions, special tokens included
    num_cut: int  # of them, captions longer than run.text.length
    seconds: dict[str, float]  # by stage, of the process that worked


class _Row(NamedTuple):
    """What the batch holds of one image, without its mask."""

    fields: dict[str, Tensor]
    changes: list[list[float]]  # of both views
    file: bytes | None  # where the device decodes
    is_cut: bool


def run_order(run: Run, sources: Sources) -> Order:
    """Which sample the run draws at every position of its order."""
    weights = [float(source.weight) for source in run.data.values()]
    return Order(run.seed, weights, [source.shards.shard_sizes for source in sources.opened], run.mixing)


def tried_draws(draw: int) -> Iterator[int]:
    """The sample of a source that is drawn, and those that may replace it: the next, then ever farther ones.

    Growing strides leave a whole shard that is gone after a few tries, and spread its replacements.
    """
    return (draw + 2**tried - 1 for tried in range(MAX_TRIED))


class Steps:
    """step -> Delivery of one rank. Worker processes rebuild it from its arguments."""

    def __init__(self, run: Run, sources: Sources, rank: int, world: int) -> None:
        self._arguments = (run, sources, rank, world)
        self.run = run
        self.sources = sources
        self._rank, self._world = rank, world
        self._images = run.images_per_rank(world)
        self.order = run_order(run, sources)
        self._needs_other = run.objective.needs_other_view()
        self._seconds: dict[str, float] = {}
        self._windows = [range(0)] * len(sources.opened)  # draws whose shards are being copied

    def __reduce__(self) -> tuple:
        return Steps, self._arguments

    def __getitem__(self, step: int) -> Delivery:
        return self.make(step)

    def make(self, step: int, rooms: Rooms | None = None) -> Delivery:
        """What the rank gets at a step; its tensors lie in one piece of memory, one of `rooms` if these are given."""
        first = step * self.run.batch + self._rank * self._images
        positions = range(first, first + self._images)
        self._seconds = dict.fromkeys(STAGES, 0.0)
        dropped: list[Dropped] = []
        with self._during("batch"):
            masks = [self._masks(position) for position in positions[:: self.run.objective.input.mixed]]
            whole = {"mask": torch.cat(masks), "position": torch.tensor(positions)}
        rows: list[_Row] = []
        fields: dict[str, Tensor] = {}
        for number, position in enumerate(positions):
            row = self._row(position, dropped)
            with self._during("batch"):
                fields = fields or _room(row, whole, len(positions), rooms)
                for name, value in row.fields.items():
                    assert value.shape == fields[name].shape[1:], f"{name} of {position} is of another shape"
                    fields[name][number] = value
            rows.append(row._replace(fields={}))
        batch = Batch(**fields)
        return Delivery(
            batch,
            self._unfinished(rows),
            tuple(dropped),
            len(rows),
            int(batch.has_tags.sum()),
            int((batch.tags != NO_TAG).any(dim=1).sum()),
            int(batch.has_text.sum()),
            int(batch.token_mask.sum()),
            sum(row.is_cut for row in rows),
            self._seconds,
        )

    def pick(self, position: int) -> Pick:
        """The sample that stands at a position."""
        return self.order[position]

    def decoded_here(self) -> Steps:
        """The same steps, with nothing but the colours left to the device."""
        views = replace(self.run.views, on_device="colours")
        return Steps(replace(self.run, views=views), self.sources, self._rank, self._world)

    def _unfinished(self, rows: list[_Row]) -> Unfinished | None:
        if self.run.views.on_device == "none":
            return None
        files = {number: row.file for number, row in enumerate(rows) if row.file is not None}
        return Unfinished(torch.tensor([row.changes for row in rows]), tuple(files.values()), tuple(files))

    @contextmanager
    def _during(self, stage: str) -> Iterator[None]:
        """Counts the time inside as that of a stage, also of a sample that turns out to be bad."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - begun

    def _row(self, position: int, dropped: list[Dropped]) -> _Row:
        """What the batch holds of one image; a bad sample is replaced by another of the same source.

        Only the sample that stands at the position is counted as dropped: the others that are tried, and may be bad
        too, stand at positions of their own.
        """
        number, draw = self.order.draw(position)
        source = self.sources.opened[number]
        if source.shards.is_remote and draw not in self._windows[number]:
            self._windows[number], needed = self.order.window(number, draw)
            source.shards.fetch_ahead(needed)
            for other in self.sources.opened:
                other.shards.keep_ahead()
        bad: list[Dropped] = []
        for tried in tried_draws(draw):
            pick = self.order.pick(number, tried)
            try:
                return self._sample_row(source, pick.shard, pick.index, position)
            except BadSample as error:
                shard = source.shards.manifest.shards[pick.shard].name
                bad.append(Dropped(source.name, shard, pick.index, error.reason, str(error)))
                if tried == draw:
                    dropped.append(bad[0])
        raise NoneUsable(
            f"{MAX_TRIED} samples of source {source.name!r} in turn cannot be used, the last: {bad[-1]}; "
            f"run `python -m data_prep check {source.shards.place}` and build the data set again",
            tuple(bad),
        )

    def _sample_row(self, source: OpenSource, shard: int, index: int, position: int) -> _Row:
        run = self.run
        with self._during("read"):
            _, members = source.shards.read(shard, index)
        encoded = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), None)
        if encoded is None:
            raise BadSample("no_image", f"the sample holds {sorted(members)}, none of {IMAGE_EXTENSIONS}")
        with self._during("labels"):
            category = source.category(members)
            tags = self._tags(source, members)
            tokens = self._tokens(source, members, position)
        with self._during("decode"):
            left = self._left_to_device(encoded)
            image = None if left else decode_image(encoded)
            height, width = left or image.shape[:2]
        num_views = 1 + self._needs_other[position % run.objective.input.mixed]
        on_device = run.views.on_device
        with self._during("views"):
            drawn = draw_views(height, width, run.views, _generator(run.seed, position, "views"), num_views)
            views, boxes = make_views(image, drawn, run.views.size, with_colours=on_device == "none")
        left_changes = [one.change for one in drawn if on_device != "none"]
        changes = [change.numbers() for change in [*left_changes, Change(), Change()][:2]]
        fields = {
            "views": views,
            "boxes": boxes,
            "sizes": torch.tensor([height, width], dtype=torch.float32),
            "category": torch.tensor(category),
            "tokens": tokens.numbers,
            "token_mask": tokens.is_real,
            "tags": tags,
            "has_tags": torch.tensor(source.gives_tags),
        }
        return _Row(fields, changes, encoded if left else None, tokens.is_cut)

    def _left_to_device(self, encoded: bytes) -> tuple[int, int] | None:
        """Height and width of a file that the device decodes and cuts."""
        size = plain_jpeg_size(encoded) if self.run.views.on_device == "all" else None
        return size if size is not None and can_cut(*size, self.run.views.size) else None

    def _tags(self, source: OpenSource, members: Mapping[str, bytes]) -> Int[Tensor, " most"]:
        """Tags that are sure enough, the most confident first; as wide for every sample of the run."""
        told, most = source.tags(members), MOST_TAGS if self.sources.tags else 0
        sure = [number for number, confidence in told.items() if confidence >= self.run.tags.min_score][:most]
        return torch.tensor([*sure, *[NO_TAG] * (most - len(sure))], dtype=torch.long)

    def _tokens(self, source: OpenSource, members: Mapping[str, bytes], position: int) -> Tokens:
        captions, length = self.sources.captions, self.run.text.length
        if captions is not None and source.gives_text:
            told = source.captions(members)
            chosen = int(_generator(self.run.seed, position, "caption").random() * len(told))
            return captions.tokens(told[chosen])
        padding = 0 if captions is None else captions.padding
        return Tokens(torch.full((length,), padding), torch.zeros(length, dtype=torch.bool), False)

    def _masks(self, position: int) -> Bool[Tensor, "views g g"]:
        """The masks of the inputs that begin at `position`, one a view; all False where they hide nothing."""
        grid, shown = self.run.grid, self.run.objective.input
        if not shown.hides:
            return torch.zeros(shown.views, grid, grid, dtype=torch.bool)
        generator = _generator(self.run.seed, position, "mask")
        return torch.stack([draw_mask(grid, self.run.mask, generator) for _ in range(shown.views)])


def _room(row: _Row, whole: Mapping[str, Tensor], num_rows: int, rooms: Rooms | None) -> dict[str, Tensor]:
    """The fields of a batch of as many rows like this one, still without them, and with what is `whole`."""
    forms = {name: (value.dtype, (num_rows, *value.shape)) for name, value in row.fields.items()}
    forms |= {name: (value.dtype, tuple(value.shape)) for name, value in whole.items()}
    fields = room_for(forms, rooms)
    for name, value in whole.items():
        fields[name].copy_(value)
    return fields


def _generator(seed: int, position: int, purpose: str) -> Random:
    """Random numbers of one purpose at one position of the run's order."""
    return Random(f"{seed}/{position}/{purpose}")
