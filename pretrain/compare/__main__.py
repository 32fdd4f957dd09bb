"""Which method is worth what, on equal terms?

python -m pretrain.compare everything --data scenes=DIR/train --sets scenes=DIR --out DIR [--seeds 0 1 2]
    [--only NAME ...] [--steps N] [--batch N] [--fine-tune EPOCHS] [--guide NAME=DIR ...] [--jobs N] [--ranks N]
    [--full] [--dry-run] [overrides of every recipe: --optim.lr 5e-4 --views.scale 0.2 1.0]

One row of the table of objectives after the other is pre-trained on the same data with the same backbone, budget and
seeds, and probed on every set. The same command again goes on where it stopped; OUT/comparison.md, .svg and .json
show what there is so far. --full takes the paper's size; --dry-run writes the recipes and prints all
commands, for a cluster's own queue.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data_prep.files import write_atomic
from pretrain import strict_json
from pretrain.compare import tell
from pretrain.compare.comparisons import COMPARISONS, Comparison, choose
from pretrain.compare.plan import Job, Settings, plan
from pretrain.compare.result import collect
from pretrain.compare.work import prepare, shell_line, tasks_left, work_off
from pretrain.exits import INTERRUPTED
from pretrain.lock import only_writer
from pretrain.models.guides import open_guide
from pretrain.named_folders import named_folders
from pretrain.objectives import OBJECTIVES


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what is left: overrides of the recipes."""
    parser = argparse.ArgumentParser(
        "python -m pretrain.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(_offer(name, comparison) for name, comparison in COMPARISONS.items()),
        allow_abbrev=False,
    )
    parser.add_argument("comparison", help=f"one of {', '.join(COMPARISONS)}")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="NAME=DIR", help="data sets to pre-train on"
    )
    parser.add_argument(
        "--sets", nargs="+", required=True, metavar="NAME=DIR", help="folders of train/ and heldout/"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison")
    parser.add_argument(
        "--guide", nargs="+", default=[], metavar="NAME=DIR", help="frozen encoders, by variant"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some of the variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds (0)")
    parser.add_argument("--steps", type=int, help="optimizer steps of every run, in place of the recipe's")
    parser.add_argument("--batch", type=int, help="images of a step, in place of the recipe's")
    parser.add_argument("--fine-tune", type=int, default=0, help="epochs of fine-tuning (0: none)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (1)")
    parser.add_argument("--full", action="store_true", help="the paper's size in place of the small one")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left and end")
    return parser.parse_known_args(arguments)


def _offer(name: str, comparison: Comparison) -> str:
    source = f" ({comparison.source})" if comparison.source else ""
    return (
        f"  {name}: {comparison.about}{source}; {len(comparison.variants)} variants; with --full {comparison.epochs} "
        f"epochs, about {comparison.gpu_hours} hours of one H200 a variant and seed (from operations, not measured)"
    )


def _absolute(option: str, pairs: Sequence[str]) -> dict[str, Path]:
    """Commands run in another folder than this one."""
    return {name: folder.resolve() for name, folder in named_folders(option, pairs).items()}


def compare(arguments: list[str] | None = None) -> int:
    """Works the comparison off and writes what it found; exit code 1 when a run failed.

    ValueError and OSError for what the user can mend, before anything is run.
    """
    options, overrides = parse(arguments)
    comparison = choose(options.comparison, tuple(options.only))
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs} must be positive: 1 runs one after the other")
    settings = Settings(
        data=_absolute("--data", options.data),
        sets=_absolute("--sets", options.sets),
        guides=_absolute("--guide", options.guide),
        out=options.out.resolve(),
        seeds=tuple(options.seeds),
        is_full=options.full,
        steps=options.steps,
        batch=options.batch,
        fine_tune=options.fine_tune,
        ranks=options.ranks,
        overrides=tuple(overrides),
    )
    check_guides(comparison, settings)
    if options.dry_run:
        for job in plan(comparison, settings):
            if tasks := tasks_left(job):
                prepare(job)
                print(*(shell_line(job, task) for task in tasks), sep="\n")
        return 0
    return run(options.comparison, comparison, settings, options.jobs)


def check_guides(comparison: Comparison, settings: Settings) -> None:
    """ValueError for a guide that its variant could not use: after hours of other variants it would be too late."""
    for variant in comparison.variants:
        if variant.guide in settings.guides:
            guide = open_guide(settings.guides[variant.guide])
            needs_codes = any(t.encoder == "tokenizer" for t in OBJECTIVES[variant.row].targets.values())
            if needs_codes and not guide.num_codes:
                raise ValueError(
                    f"--guide {variant.guide}={guide.folder} has no codebook, which {variant.name} predicts: make it "
                    "by `python -m pretrain.codebook`"
                )


def run(name: str, comparison: Comparison, settings: Settings, num_at_once: int) -> int:
    """Every job, `num_at_once` side by side, then the table; exit code 1 when one failed. ValueError as `plan`."""
    jobs = plan(comparison, settings)
    if num_at_once > 1 and torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise ValueError(
            f"--jobs {num_at_once} would share the GPUs: say --jobs 1, where each run takes as many as --ranks says, "
            "or set DS_ACCELERATOR=cpu"
        )
    with only_writer(settings.out):
        failures = work_off(jobs, num_at_once, settings.ranks)
        publish(name, comparison, settings, jobs)
    for failure in failures:
        print(
            f"failed: {failure.job.folder.name}, code {failure.code}: {shlex.join(failure.task.command)}",
            file=sys.stderr,
        )
    return 1 if failures else 0


def publish(name: str, comparison: Comparison, settings: Settings, jobs: Sequence[Job]) -> None:
    """Writes comparison.json, .md and .svg of what is measured so far, and prints the table."""
    found = collect(jobs)
    if not found.methods:
        print("nothing is measured: no evaluation of what is asked has been finished")
        return
    text = tell.table(comparison, settings, jobs, found)
    record = tell.record(name, comparison, settings, jobs, found)
    for suffix, content in {
        "json": strict_json.dumps(record, indent=1) + "\n",
        "md": text,
        "svg": tell.figure(comparison, found),
    }.items():
        write_atomic(settings.out / f"comparison.{suffix}", content.encode())
    print(text)
    print(f"written to {settings.out}/comparison.md, .svg and .json")


def main(arguments: list[str] | None = None) -> int:
    """Exit code. A mistake of the user's is told in one message."""
    signal.signal(signal.SIGTERM, _interrupt)  # a queue's way to end it: the runs must end as well
    try:
        return compare(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on with what is left", file=sys.stderr)
        return INTERRUPTED


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
