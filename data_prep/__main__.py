"""How is a data set built and looked after? `python -m data_prep build SOURCE`, `check DIR`, `stats DIR`, ..."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Union

import duckdb
import tyro

from data_prep.build import Options, build, build_part, finish
from data_prep.check import BadDataSet
from data_prep.doctor.commands import DOCTOR, Mirror, repair_all, summary
from data_prep.doctor.finished import reached
from data_prep.doctor.repair import jobs_from_mirror, jobs_from_source
from data_prep.estimate import estimate
from data_prep.output import read_manifest
from data_prep.places import Place
from data_prep.samples import Collection
from data_prep.sources.cc12m import Cc12m
from data_prep.sources.folder import Folder
from data_prep.sources.imagenet22k import ImageNet22k
from data_prep.sources.laion400m import Laion
from data_prep.sources.open_images import OpenImages
from data_prep.sources.scenes import Scenes
from data_prep.sources.scratch import on_disk
from data_prep.sources.tencent_ml import TencentMl
from data_prep.sources.yfcc15m import Yfcc15m

GOES_ON = "run the same command again, a build goes on after its last finished shard"
SOURCES = {  # name -> settings that know their collections()
    "scenes": Scenes,
    "folder": Folder,
    "laion400m": Laion,
    "cc12m": Cc12m,
    "yfcc15m": Yfcc15m,
    "imagenet22k": ImageNet22k,
    "tencent_ml": TencentMl,
    "open_images": OpenImages,
}

Source = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in SOURCES.items())]  # noqa: UP007


@dataclass(frozen=True)
class Build:
    """Turn a source into checked shards; the same command again goes on where it stopped."""

    source: Source
    out: str  # folder or URL (s3://bucket/folder) of the data set, or of one data set a split
    options: Options
    # say how many shards, bytes and hours it takes; nothing is written but what a source keeps in its scratch folder
    dry_run: bool = False

    def run(self) -> None:
        """Build every split; the tokenizer of the first one with captions serves the others."""
        out = reached(self.out)  # before hours of listing and downloading
        collections = _collections(self.source)
        is_single = len(collections) == 1 and not collections[0].has_split_folder
        places = [out if is_single else out.child(collection.split) for collection in collections]
        if self.dry_run:
            for collection, place in zip(collections, places, strict=True):
                print(estimate(collection, place, self.options))
            scratch = getattr(self.source, "scratch", None)
            kept = f" but lists and indices in {scratch}, which the build goes on from" if scratch else ""
            print(f"nothing was written{kept}")
            return
        if self.options.part and not self._build_share(collections, places):
            return
        self._build_whole(collections, places)
        print(f"next: python -m data_prep check {shlex.quote(str(out))}")

    def _build_whole(self, collections: list[Collection], places: list[Place]) -> None:
        teacher: Place | None = None
        for collection, place in zip(collections, places, strict=True):
            began = time.monotonic()
            make = finish if self.options.part else build
            is_new = make(collection, place, self.options, teacher)
            manifest = read_manifest(place)
            if teacher is None and manifest.has_text:
                teacher = place
            did = (
                f"built in {time.monotonic() - began:.1f} s" if is_new else "complete already, nothing to do"
            )
            print(f"{place}: {summary(manifest)}; {did}")

    def _build_share(self, collections: list[Collection], places: list[Place]) -> bool:
        """Whether all shares of all splits are finished with this one."""
        is_all = True
        for collection, place in zip(collections, places, strict=True):
            share = build_part(collection, place, self.options)
            is_all &= share.num_finished == share.num_shards
            print(
                f"{place}: part {share.part} has its {share.num_own} shards, {share.num_finished} of "
                f"{share.num_shards} are finished in all"
            )
        if not is_all:
            print("next: the part that finishes last makes the manifest; should one fail, submit it again")
        return is_all


def _collections(source: Source) -> list[Collection]:
    scratch = getattr(source, "scratch", None)
    with on_disk(scratch) if scratch is not None else nullcontext():
        return source.collections()


REPAIRERS = {"mirror": Mirror, **SOURCES}  # where good shards come from

Repairer = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in REPAIRERS.items())]  # noqa: UP007


@dataclass(frozen=True)
class Repair:
    """Mend bad shards, from a mirror or from the source of the build; the sha256 of the manifest is the proof."""

    repairer: Repairer
    folder: tyro.conf.Positional[str]  # a data set, or the folder above its splits; a path or a URL
    workers: int = 2  # processes that look for what is bad

    def run(self) -> int:
        """1 when anything is still bad."""
        place = reached(self.folder)
        if isinstance(self.repairer, Mirror):
            return repair_all(jobs_from_mirror(place, reached(self.repairer.place)), self.workers)
        return repair_all(jobs_from_source(place, _collections(self.repairer)), self.workers)


COMMANDS = {"build": Build, **DOCTOR, "repair": Repair}  # name -> settings that know how to run()

Command = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())]  # noqa: UP007


@dataclass(frozen=True)
class Arguments:
    """The command line; errors call its parts by the names of these fields."""

    command: Command


@contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM, as of Slurm or `kill`, is told at once and ends the block like Ctrl-C; on the main thread only."""

    def end(number: int, frame: object) -> None:
        print(
            f"SIGTERM: ends when the shards in the making are finished; {GOES_ON}",
            file=sys.stderr,
            flush=True,
        )
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 = done, 1 = the data are at fault, 2 = the arguments (by tyro), 130 or 143 = interrupted."""
    flat = (tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        parsed = tyro.cli(
            Arguments, args=arguments, prog="python -m data_prep", description=__doc__, config=flat
        )
        with _told_to_end():
            return parsed.command.run() or 0
    except (BadDataSet, ValueError, OSError, ImportError) as error:
        text = (
            error.strerror
            if isinstance(error, OSError) and error.strerror and not error.filename
            else str(error)
        )
        print(f"error: {text}", file=sys.stderr)
        return 1
    except duckdb.Error as error:
        print(
            f"error: a table cannot be queried as it is ({str(error).splitlines()[0][:300]}): pass the files as they"
            " were published, or give the step more memory or disk",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as stopped:
        print(f"interrupted: {GOES_ON}", file=sys.stderr)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
