"""How is a data set built, checked and described? `python -m data_prep build SOURCE | check DIR | stats DIR`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Union

import tyro

from data_prep.build import Options, build
from data_prep.check import BadDataSet, check, data_sets
from data_prep.schema import Manifest
from data_prep.sources.folder import Folder
from data_prep.sources.scenes import Scenes
from data_prep.stats import describe

SOURCES = {"scenes": Scenes, "folder": Folder}  # name -> settings that know their collections()

Source = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in SOURCES.items())]  # noqa: UP007


@dataclass(frozen=True)
class Build:
    """Turn a source into checked shards; the same command again goes on where it stopped."""

    source: Source
    out: Path  # folder of the data set, or of one data set a split
    options: Options

    def run(self) -> None:
        """Build every split; the tokenizer of the first one with captions serves the others."""
        collections = self.source.collections()
        is_single = len(collections) == 1 and not collections[0].has_split_folder
        teacher: Path | None = None
        for collection in collections:
            folder = self.out if is_single else self.out / collection.split
            began = time.monotonic()
            is_new = build(collection, folder, self.options, teacher)
            manifest = Manifest.read(folder)
            if teacher is None and manifest.has_text:
                teacher = folder
            did = (
                f"built in {time.monotonic() - began:.1f} s" if is_new else "complete already, nothing to do"
            )
            print(f"{folder}: {_summary(manifest)}; {did}")


@dataclass(frozen=True)
class Check:
    """Read every byte of a data set again; the first bad shard and member are named and the exit code is 1."""

    folder: tyro.conf.Positional[Path]  # a data set, or the folder above its splits

    def run(self) -> None:
        """Check the data set, or each one below the folder."""
        for folder in data_sets(self.folder):
            print(f"{folder}: {_summary(check(folder))}; every byte is as built")


@dataclass(frozen=True)
class Stats:
    """Counts, caption lengths, categories and what was left out."""

    folder: tyro.conf.Positional[Path]  # a data set, or the folder above its splits

    def run(self) -> None:
        """Describe the data set, or each one below the folder."""
        for folder in data_sets(self.folder):
            print(describe(folder))


def _summary(manifest: Manifest) -> str:
    left_out = ", ".join(f"{reason} {count}" for reason, count in manifest.dropped.items()) or "nothing"
    return f"{manifest.num_samples:,} samples in {len(manifest.shards)} shards, left out: {left_out}"


Command = Union[  # noqa: UP007
    Annotated[Build, tyro.conf.subcommand("build")],
    Annotated[Check, tyro.conf.subcommand("check")],
    Annotated[Stats, tyro.conf.subcommand("stats")],
]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 = done, 1 = the data are at fault, 2 = the arguments (by tyro), 130 = interrupted."""
    flat = (tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        tyro.cli(Command, args=arguments, prog="python -m data_prep", description=__doc__, config=flat).run()
    except (BadDataSet, ValueError, OSError) as error:
        text = (
            error.strerror
            if isinstance(error, OSError) and error.strerror and not error.filename
            else str(error)
        )
        print(f"error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "interrupted: run the same command again, it goes on after the last finished shard",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
