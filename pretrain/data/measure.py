"""What does a run's data give, and how fast? Counted and timed on the loader that training uses."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.config import Run
from pretrain.data.faults import DataError
from pretrain.data.loader import Loader
from pretrain.data.order import CYCLE
from pretrain.data.sources import open_sources
from pretrain.data.steps import STAGES, run_order
from pretrain.facts import DataFacts
from pretrain.place import Place

BATCH = 32  # inputs that are made together; the run's own batch may be that of hundreds of ranks
PLANNED = (
    10 * CYCLE
)  # positions whose sources are counted, which takes no reading: shares as in the whole run


@dataclass(frozen=True)
class SourceCount:
    """One source in the run's order."""

    name: str
    supervision: str
    num_samples: int
    num_shards: int
    share: float  # of all samples, as asked
    reached: float  # among the first PLANNED positions
    epochs: float  # passes over the source until the run's last step


@dataclass(frozen=True)
class Measured:
    """The first images of a run, made by the training loader."""

    num_images: int
    workers: int
    first_seconds: float  # until the first batch, start of the workers included
    seconds: float  # for the batches after the first
    num_timed: int  # images in these
    stages: Mapping[str, float]  # seconds an image by stage, of the process that works
    facts: DataFacts  # of the data, as training reads them
    dropped: Mapping[str, int]  # "source: reason" -> samples replaced
    tokens: tuple[float, float] | None  # of captions: mean length, share that is cut to run.text.length
    would_stop: str  # why a training with run.max_bad would; "" if it would not
    is_broken: bool  # it would with any max_bad: of this data no more images can be made
    peak_bytes: int | None  # the most that a process that works has held; None where the system does not tell

    @property
    def rate(self) -> float:
        """Images a second that reach the trainer."""
        return self.num_timed / self.seconds if self.num_timed else float("nan")


def count_sources(run: Run, folders: Mapping[str, Place], tokenizer: Path | None) -> list[SourceCount]:
    """Every source of the run; ValueError and FileNotFoundError as `open_sources` and `Order`."""
    sources = open_sources(run, folders, tokenizer)
    order = run_order(run, sources)
    counts = Counter(order.draw(position)[0] for position in range(PLANNED))
    return [
        SourceCount(
            name=source.name,
            supervision=run.data[source.name].supervision,
            num_samples=len(source.shards),
            num_shards=len(source.shards.shard_sizes),
            share=share,
            reached=counts[number] / PLANNED,
            epochs=counts[number] / PLANNED * run.batch * run.steps / len(source.shards),
        )
        for number, (source, share) in enumerate(zip(sources.opened, order.shares, strict=True))
    ]


def measure(
    run: Run,
    folders: Mapping[str, Place],
    tokenizer: Path | None,
    num_images: int,
    workers: int,
    dropped_to: Path | None = None,
) -> Measured:
    """Makes at least `num_images` images from the run's first position on, by `workers` processes (0: this one).

    Fewer where so many samples in turn are bad that no more can be made.
    Arguments and errors as those of `Loader`.
    """
    batch = BATCH * run.objective.input.mixed
    begun = time.perf_counter()
    loader = Loader(
        replace(run, batch=batch, max_bad=1.0),  # where training would stop, its data is to be looked at
        folders,
        tokenizer,
        rank=0,
        world=1,
        workers=workers,
        dropped_to=dropped_to,
    )
    first, since, would_stop, is_broken = 0.0, begun, "", False
    with closing(loader):
        try:
            for _ in loader:
                if not first:
                    since = time.perf_counter()
                    first = since - begun
                if loader.num_images >= num_images:
                    break
        except DataError as error:
            would_stop, is_broken = str(error), True
        seconds = time.perf_counter() - since
        working = [child.pid for child in multiprocessing.active_children()] if workers else [os.getpid()]
        peaks = [peak for peak in map(peak_bytes_of, working) if peak is not None]
    num_captions = loader.num_captions
    try:
        loader.require_few(run.max_bad)
    except DataError as error:
        would_stop = would_stop or str(error)
    return Measured(
        num_images=loader.num_images,
        workers=workers,
        first_seconds=first,
        seconds=seconds,
        num_timed=max(loader.num_images - batch, 0),
        stages={stage: loader.seconds[stage] / max(loader.num_images, 1) for stage in STAGES},
        facts=loader.facts,
        dropped=dict(loader.dropped),
        tokens=(loader.num_tokens / num_captions, loader.num_cut / num_captions) if num_captions else None,
        would_stop=would_stop,
        is_broken=is_broken,
        peak_bytes=max(peaks, default=None),
    )


def peak_bytes_of(process: int | None) -> int | None:
    """The most memory that a process has held so far, as Linux counts it."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kibibytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(kibibytes[0]) if kibibytes else None
