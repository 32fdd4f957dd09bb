"""What does a run's data give, how fast is it, and what does it look like?

python -m pretrain.data NAME=DIR [NAME=DIR ...] --recipe RECIPE [--images N] [--workers N] [--tokenizer DIR]
    [--out FILE.html] [overrides of the recipe: --views.size 96 --mixing.by size]

One DIR alone stands for every source of the recipe; N is rounded up to whole batches of 32 inputs. Prints the sources
and their shares, the time of every stage of the training loader and what it had to replace; writes the same and the
run's first inputs, with boxes, masks and labels, to FILE.html, and a list of the replaced samples to
FILE.dropped.jsonl. Data with more broken samples than training goes on with is looked at like any other; where no
image can be made of it, the page says so and the exit code is 1. A shard that is missing, truncated or changed is an
error before, as at the start of training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.files import write_atomic
from pretrain import recipes
from pretrain.arguments import match_sources, override
from pretrain.command import exit_code, require_place
from pretrain.config import Run
from pretrain.data.faults import DataError
from pretrain.data.measure import Measured, SourceCount, count_sources, measure
from pretrain.place import Place, is_url
from pretrain.report.document import Section, document
from pretrain.report.pairs import legend, pair_pictures, read_pairs
from pretrain.served import active_targets, left_out
from pretrain.visualize.markup import Html, element, table
from pretrain.visualize.numbers import percent, significant

PROGRAM = "python -m pretrain.data"
SHOWN = 6  # inputs in the page
SOURCE_HEAD = ("source", "supervision", "samples", "shards", "share asked", "reached", "passes in the run")
STAGE_HEAD = ("stage", "ms an image", "of all", "images/s a process")


def parse(arguments: Sequence[str] | None) -> tuple[Run, argparse.Namespace]:
    """The resolved run and the options; ValueError and FileNotFoundError as pretrain/main.py."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data", nargs="+", metavar="NAME=DIR", help="folders of the recipe's sources")
    parser.add_argument(
        "--recipe", required=True, help=f"one of {', '.join(recipes.names())}, or a recipe.json"
    )
    parser.add_argument("--images", type=int, default=512, help="images to make (512), up to whole batches")
    parser.add_argument("--workers", type=int, default=0, help="processes that make them (0: this one)")
    parser.add_argument("--tokenizer", type=Path, help="instead of that beside the captioned shards")
    parser.add_argument("--out", type=Path, default=Path("data.html"), help="page to write (data.html, here)")
    options, overrides = parser.parse_known_args(arguments)
    run = override(recipes.load(options.recipe), overrides, PROGRAM)
    if len(options.data) == 1 and (is_url(options.data[0]) or "=" not in options.data[0]):
        options.data = [f"{name}={options.data[0]}" for name in run.data]
    options.data = match_sources(run, options.data, "the command line")
    if options.images < 1 or options.workers < 0:
        raise ValueError(
            f"--images {options.images} must be at least 1 and --workers {options.workers} not negative"
        )
    if options.out.is_dir() or not options.out.parent.is_dir():
        raise ValueError(f"--out {options.out} must be a file in a folder that exists, such as data.html")
    require_place("--out", options.out)
    return run, options


def source_rows(sources: Sequence[SourceCount]) -> list[list[str]]:
    return [
        [
            source.name,
            source.supervision,
            f"{source.num_samples:,}",
            f"{source.num_shards:,}",
            percent(source.share),
            percent(source.reached),
            significant(source.epochs),
        ]
        for source in sources
    ]


def stage_rows(measured: Measured) -> list[list[str]]:
    total = sum(measured.stages.values())
    if not measured.num_images:
        return []
    return [
        [
            stage,
            f"{1000 * seconds:.2f}",
            percent(seconds / total, 0),
            f"{1 / seconds:,.0f}" if seconds else "–",
        ]
        for stage, seconds in [*measured.stages.items(), ("all", total)]
    ]


def remarks(run: Run, measured: Measured, dropped_to: Path) -> list[str]:
    """What stands below the tables, a sentence each."""
    who = f"{measured.workers} workers" if measured.workers else "this process"
    rate = f"{measured.rate:,.0f} images/s" if measured.num_timed else "too few images to tell the rate"
    said = [
        f"{measured.num_images} images by {who}: {rate}, the first batch after {measured.first_seconds:.1f} s."
    ]
    if measured.peak_bytes is not None:
        whose = "the largest worker" if measured.workers else "this process"
        said.append(f"Memory of {whose}: {measured.peak_bytes / 2**20:,.0f} MiB at most.")
    if measured.tokens is not None:
        mean, cut = measured.tokens
        said.append(
            f"Captions have {mean:.1f} tokens on average, {percent(cut)} were longer than text.length="
            f"{run.text.length} and cut."
        )
    if measured.dropped:
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(measured.dropped.items()))
        said.append(f"Replaced: {counts}; listed in {dropped_to}.")
    elif not measured.would_stop:
        said.append("No sample had to be replaced.")
    if measured.would_stop:
        said.append(f"Training would stop here: {measured.would_stop}.")
    try:
        active_targets(run, measured.facts)
    except ValueError as error:
        said.append(f"Training would stop here: {error}.")
    else:
        said += [f"{line}." for line in (left_out(run, measured.facts),) if line]
    return said


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: names to the left, numbers to the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(line)
        ).rstrip()
        for line in (list(zip(row, widths, strict=True)) for row in (head, *rows))
    )


def look(arguments: Sequence[str] | None = None) -> None:
    """Prints and writes everything; ValueError and OSError for what the user can mend."""
    run, options = parse(arguments)
    place = (run, options.data, options.tokenizer)
    sources = count_sources(*place)
    print(aligned(SOURCE_HEAD, source_rows(sources)), flush=True)
    dropped_to = options.out.with_suffix(".dropped.jsonl")
    dropped_to.unlink(missing_ok=True)
    measured = measure(*place, options.images, options.workers, dropped_to)
    said = remarks(run, measured, dropped_to)
    print("", aligned(STAGE_HEAD, stage_rows(measured)), "", *said, sep="\n")
    text = document(
        f"data of {run.name}",
        element("header", element("h1", f"What {run.name} is fed")),
        [
            Section("sources", "Sources", table(SOURCE_HEAD, source_rows(sources), "numbers")),
            Section("stages", "Stages", _stages(measured, said)),
            Section("inputs", "First inputs", _inputs(*place)),
        ],
    )
    write_atomic(options.out, text.encode())
    print(f"written to {options.out.absolute()}")
    if measured.is_broken:
        raise DataError(measured.would_stop)


def _inputs(run: Run, folders: Mapping[str, Place], tokenizer: Path | None) -> Html:
    try:
        shown = read_pairs(run, folders, tokenizer, SHOWN)
    except DataError as error:
        return element("p", f"They cannot be made: {error}", class_="note")
    return element("div", legend(run), pair_pictures(shown, run))


def _stages(measured: Measured, said: Sequence[str]) -> Html:
    notes = [element("p", sentence, class_="note") for sentence in said]
    return element("div", table(STAGE_HEAD, stage_rows(measured), "numbers narrow"), notes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code. A mistake of the user's is told in one message."""
    return exit_code(look, arguments, "the page was not written")


if __name__ == "__main__":
    sys.exit(main())
