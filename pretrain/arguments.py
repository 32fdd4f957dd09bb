"""What does the command line of pretrain/main.py ask for, and can it be right?

    python -m pretrain.arguments ARGUMENTS      reads them alone, within a second: 0, or 2 and what is wrong

Neither torch nor DeepSpeed is imported.
"""

from __future__ import annotations

import argparse
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from pretrain import recipes
from pretrain.command import no_folder
from pretrain.config import Run
from pretrain.data.cache import most_bytes
from pretrain.evaluate.splits import FOLDERS, found_in
from pretrain.exits import FINISHED, MISTAKE
from pretrain.initial.asked import init_of
from pretrain.named_folders import named_places
from pretrain.place import Place, is_url, place_of
from pretrain.watchdog import TIMEOUT

ROOT = Path(__file__).resolve().parent.parent
USAGE = """
deepspeed pretrain/main.py --recipe m3i.demo --data NAME=DIR [NAME=DIR ...] --out DIR [--ds-config FILE]
    [--tokenizer DIR] [--guide DIR] [--init PATH[:teacher] [--init-heads]] [--workers N] [--micro-batches N]
    [--checkpoints DIR|URL] [--timeout SECONDS] [--wandb] [--tensorboard] [--price P] [--profile FIRST:LAST]
    [--compile] [--evaluate-every N --evaluate-data DIR]
    [overrides of the recipe: --optim.lr 5e-4 --data.NAME.weight 2]

deepspeed pretrain/main.py --replay OUT/replay/BUNDLE

The same command again goes on from the last checkpoint in --out. Without a launcher it runs as one process. The
second form runs a refused step again, on as many ranks.
"""
MOST_TIMEOUT = 10**6  # seconds, eleven days: nobody waits longer for a rank
NUMBERS: dict[Any, tuple[type, str]] = {"int": (int, "a whole number"), "float": (float, "a number")}


def read(arguments: list[str]) -> tuple[Run, argparse.Namespace] | Path:
    """What to train, or the bundle of a refused step to run again; raises as `parse`."""
    if any(argument.split("=")[0] == "--replay" for argument in arguments):
        return parse_replay(arguments)
    return parse(arguments)


def parse(arguments: list[str]) -> tuple[Run, argparse.Namespace]:
    """The resolved run and the paths; prints what is wrong and exits (SystemExit) or raises ValueError."""
    parser = argparse.ArgumentParser(
        prog="pretrain/main.py", description=USAGE, allow_abbrev=False, add_help=False
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(recipes.names())}")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="NAME=DIR",
        help="of the sources; or s3://...",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of this run, made if there is none")
    parser.add_argument(
        "--ds-config",
        type=Path,
        default=ROOT / "ds_configs" / "zero3.json",
        help="memory and communication: a JSON file of ds_configs/ (zero3.json)",
    )
    parser.add_argument("--tokenizer", type=Path, help="instead of that beside the captioned shards")
    parser.add_argument("--guide", type=Path, help="folder of the frozen encoder that the targets need")
    parser.add_argument(
        "--init",
        metavar="PATH[:teacher]",
        help="weights to start from: InternImage, timm, Hugging Face, an export or a run of ours; or its :student",
    )
    parser.add_argument("--init-heads", action="store_true", help="also what stands above the backbone there")
    parser.add_argument("--workers", type=int, default=0, help="decoding processes for each rank")
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=1,
        help="a rank's share of the batch passes through the model in N parts: less memory, a forward pass more",
    )
    parser.add_argument(
        "--checkpoints", type=place_of, help="folder or s3://bucket/prefix; OUT/checkpoints if left out"
    )
    parser.add_argument("--wandb", action="store_true", help="also log to wandb (WANDB_MODE=offline works)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"without progress, before a run ends that has lost a rank ({TIMEOUT:.0f}; thrice at first)",
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write OUT/tensorboard")
    parser.add_argument("--price", type=float, help="of an hour of one GPU: the log tells the run's cost")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="steps whose operators OUT/trace shows")
    parser.add_argument(
        "--compile", action="store_true", help="transformer blocks by torch.compile, not ZeRO-3"
    )
    parser.add_argument(
        "--evaluate-every", type=int, default=0, metavar="N", help="steps: kNN and zero-shot of the teacher"
    )
    parser.add_argument(
        "--evaluate-data", type=Path, metavar="DIR", help="with train/ and heldout/, for that"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the launcher
    parser.add_argument("--help", "-h", action="store_true", help="this, and the fields of --recipe")
    if {"--help", "-h"} & set(arguments):
        show_help(parser, arguments)
    paths, overrides = parser.parse_known_args(arguments)
    check_spelling(parser, overrides)
    run = override(recipes.load(paths.recipe), overrides)
    paths.data = match_sources(run, paths.data)
    if not paths.ds_config.is_file():
        there = sorted(str(path) for path in (ROOT / "ds_configs").glob("*.json"))
        raise FileNotFoundError(f"--ds-config {paths.ds_config} is no file; choose one of {there}")
    if paths.workers < 0:
        raise ValueError(f"--workers {paths.workers} must not be negative: 0 decodes in the training process")
    if not 0 < paths.timeout <= MOST_TIMEOUT:
        raise ValueError(
            f"--timeout {paths.timeout} must be positive, at most {MOST_TIMEOUT}: seconds, a few times a step's"
        )
    if paths.micro_batches < 1:
        raise ValueError(f"--micro-batches {paths.micro_batches} must be positive: 1 takes the batch at once")
    if paths.price is not None and not 0 <= paths.price < float("inf"):
        raise ValueError(f"--price {paths.price} must not be negative: what an hour of one GPU costs")
    check_evaluation(paths.evaluate_every, paths.evaluate_data)
    paths.profile = steps_of(paths.profile)
    check_guide(run, paths.guide)
    paths.init = init_of(paths.init, paths.init_heads)
    if paths.out.exists() and not paths.out.is_dir():
        raise ValueError(f"--out {paths.out} is a file: name a folder, it is made if there is none")
    return run, paths


def steps_of(text: str | None) -> tuple[int, int] | None:
    """The first and last step of FIRST:LAST; None without; ValueError when it is not two rising whole numbers."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--profile {text!r} must be FIRST:LAST, steps counted from 1, such as 10:12")
    return int(first), int(last)


def check_evaluation(every: int, folder: Path | None) -> None:
    """ValueError unless both are given or none; FileNotFoundError without the data sets."""
    if every < 0 or (every > 0) != (folder is not None):
        raise ValueError(
            f"--evaluate-every {every} with --evaluate-data {folder}: give a positive number of steps and a "
            "folder of train/ and heldout/, or neither"
        )
    for split, names in FOLDERS.items() if folder is not None else ():
        if not found_in(folder, split).is_dir():
            raise FileNotFoundError(
                f"--evaluate-data {folder} has no {'/, '.join(names)}/: `python -m data_prep build` writes {split}/"
            )


def check_guide(run: Run, folder: Path | None) -> None:
    """ValueError when a guide is needed and not named, or named and not needed; FileNotFoundError without folder."""
    if run.objective.needs_guide and folder is None:
        raise ValueError(
            f"recipe {run.name!r} predicts what a frozen encoder says: name its folder by --guide (a CLIP or vision "
            "model saved by Hugging Face or open_clip, a run of ours, a tokenizer of `python -m pretrain.codebook`)"
        )
    if folder is not None and not run.objective.needs_guide:
        raise ValueError(f"--guide {folder} would be ignored, no target of recipe {run.name!r} asks for it")
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"--guide {no_folder(folder)}: name that of a frozen encoder")


def override(run: Run, arguments: list[str], program: str = "pretrain/main.py") -> Run:
    """`run` with the fields that the command line names; ValueError, or SystemExit after tyro has told it."""
    import tyro

    check_sources(run, arguments)
    check_numbers(run, arguments)
    return tyro.cli(
        Run,
        prog=f"{program} ...",
        description="Fields of the recipe that the command line may override.",
        default=run,
        args=arguments,
        use_underscores=True,
    )


def check_spelling(parser: argparse.ArgumentParser, overrides: list[str]) -> None:
    """ValueError for an option of `parser` with _ in place of -, as fields of the recipe are written."""
    options = re.findall(r"--[a-z-]+", parser.format_usage())
    for given in (argument.split("=")[0] for argument in overrides):
        if given.startswith("--") and given not in options and (meant := given.replace("_", "-")) in options:
            raise ValueError(f"{given} is unknown, did you mean {meant}?")


def check_sources(run: Run, arguments: list[str]) -> None:
    """ValueError for an option of a source that the recipe does not have."""
    known = tuple(f"--data.{name}.".replace("-", "_") for name in run.data)  # a name may have a point in it
    for given in (argument.split("=")[0] for argument in arguments):
        if given.startswith("--data.") and not f"{given}.".replace("-", "_").startswith(known):
            raise ValueError(
                f"{given} names the source {given.split('.')[1]!r}, but recipe {run.name} has the sources "
                f"{sorted(run.data)}: choose one of them"
            )


def check_numbers(run: Run, arguments: list[str]) -> None:
    """ValueError for what follows the name of a number and is none; tyro would tell it in Python's words."""
    for name, text in pairwise(" ".join(arguments).replace("=", " ").split()):
        owner: Any = None
        value: Any = run
        *_, field = parts = name.removeprefix("--").replace("-", "_").split(".")
        for part in parts:
            owner, value = value, value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        declared = getattr(type(owner), "__annotations__", {}).get(
            field
        )  # a weight of 4 is a float all the same
        if not name.startswith("--") or declared not in NUMBERS:
            continue
        read, words = NUMBERS[declared]
        try:
            read(text)
        except ValueError:
            raise ValueError(f"{name} {text!r} must be {words}, such as {value}") from None


def show_help(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Prints the options that name places, then every field of the recipe with its value there; SystemExit."""
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--recipe", default="m3i.demo")
    run = recipes.load(chosen.parse_known_args(arguments)[0].recipe)
    parser.print_help()
    print(f"\nThe fields of {run.name}:")
    override(run, ["--help"])


def match_sources(run: Run, pairs: list[str], option: str = "--data") -> dict[str, Place]:
    """NAME=DIR or NAME=URL of the command line by name; ValueError unless the names are those of the recipe's
    sources and M3I_CACHE_GIB is a limit where a URL is among them, and as `named_places`.
    """
    folders = named_places(option, pairs)
    if folders.keys() != run.data.keys():
        raise ValueError(
            f"{option} names {sorted(folders)}, but recipe {run.name} has the sources {sorted(run.data)}: "
            "give NAME=DIR once for each of them"
        )
    if any(map(is_url, folders.values())):
        most_bytes()  # else refused as they are opened, when torch is there
    return folders


def parse_replay(arguments: list[str]) -> Path:
    """The bundle; SystemExit for anything besides it, since the bundle says the rest."""
    parser = argparse.ArgumentParser(prog="pretrain/main.py", allow_abbrev=False)
    parser.add_argument("--replay", type=Path, required=True, help="a folder below OUT/replay of a run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments).replay


def main(arguments: list[str]) -> int:
    """Exit code."""
    try:
        read(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
