"""What lies in a place of checkpoints, is it whole, and how do its weights become one file?

python -m pretrain.checkpoint ls PLACE                       a line a checkpoint
python -m pretrain.checkpoint verify PLACE                   reads every byte; exit code 1 when one is not as written
python -m pretrain.checkpoint consolidate PLACE --out FILE   the teacher (--of student) as one safetensors file

PLACE is the --out folder of a run, a folder or URL of checkpoints, or one checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pretrain import intact
from pretrain.checkpoint.names import WHOSE, checkpoints_of, folder_in, is_step, step_of, steps_in
from pretrain.checkpoint.stores import read_json, store_at
from pretrain.command import exit_code, require_place
from pretrain.place import Place, place_of


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m pretrain.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("place", type=place_of, metavar="PLACE")
    parser.add_argument("--of", choices=sorted(WHOSE), default="teacher", help="consolidate: whose weights")
    parser.add_argument("--out", type=Path, help="consolidate: the file that is written")
    return parser.parse_args(arguments)


def found_in(place: Place) -> list[Place]:
    """Folders of the checkpoints that a name means, oldest first; FileNotFoundError when there is none."""
    if is_step(place):
        return [place]
    inside = [checkpoints_of(place)] if isinstance(place, Path) else []  # of a run's own folder
    for there in (place, *inside):
        if steps := sorted(steps_in(there)):
            return [folder_in(there, step) for step in steps]
    raise FileNotFoundError(
        f"{place} holds no checkpoint: name the --out folder or the --checkpoints of a run"
    )


def ls(options: argparse.Namespace) -> None:
    """Prints step, size, ranks, ZeRO stage, precision, date and what is wrong, by sizes alone."""
    folders = found_in(options.place)
    print(f"{'step':>9} {'GiB':>8} {'ranks':>5} {'ZeRO':>4} {'precision':>9}  {'date':25} whole?")
    for folder in folders:
        store = store_at(folder)
        try:
            state = read_json(folder, "state.json")
        except (FileNotFoundError, ValueError):
            state = {}
        told = [state.get(key, "?") for key in ("world", "stage", "dtype", "date")]
        size = sum(store.sizes().values()) / 2**30
        world, stage, dtype, date = (str(value).removeprefix("torch.") for value in told)
        problem = store.problem(hashes=False)
        print(
            f"{step_of(folder):>9} {size:8.3f} {world:>5} {stage:>4} {dtype:>9}  {date:25} {problem or 'yes'}"
        )


def verify(options: argparse.Namespace) -> None:
    """Reads every byte; ValueError that names the checkpoints that are not whole."""
    broken = []
    for folder in found_in(options.place):
        problem = store_at(folder).problem(hashes=True)
        print(f"{folder}: {problem or 'whole'}")
        broken += [f"{folder} ({problem})"] if problem else []
    if broken:
        raise ValueError(f"not whole: {'; '.join(broken)}: delete them, or copy them again")


def consolidate(options: argparse.Namespace) -> None:
    """Writes the float32 weights and buffers of the newest checkpoint of PLACE; ValueError where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from pretrain.checkpoint.read import WEIGHTS  # here: the other commands need no torch
    from pretrain.given_up import given_up_by

    if options.out is None or options.out.suffix != ".safetensors" or options.out.is_dir():
        raise ValueError(
            f"--out {options.out}: consolidate writes a file whose name ends in .safetensors, such as "
            "weights.safetensors: name one"
        )
    require_place("--out", options.out)
    finished = [one for one in found_in(options.place) if intact.COMPLETE in store_at(one).sizes()]
    if isinstance(options.place, Path) and not is_step(options.place):
        gone = given_up_by(options.place, checkpoints_of(options.place))
        finished = [one for one in finished if step_of(one) not in gone]
    if not finished:
        raise ValueError(
            f"{options.place} holds no whole checkpoint that the run has not gone back from: see `ls`, and name one"
        )
    folder = finished[-1]  # an older one in its place would pass for it
    if problem := store_at(folder).problem(hashes=False):
        raise ValueError(f"{folder} cannot be used, since {problem}: see `ls` and name a whole one as PLACE")
    weights = WEIGHTS[options.of](folder)
    out = intact.followed(options.out)
    partial = out.with_name(f".tmp-{out.name}")
    origin = {
        "checkpoint": str(folder),
        "of": options.of,
        "state": json.dumps(read_json(folder, "state.json")),
    }
    try:
        save_file({name: values.contiguous() for name, values in weights.items()}, partial, metadata=origin)
        intact.flush(partial)
        partial.replace(out)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{options.out} could not be written ({error}): free space there, or name another file"
        ) from error
    num_values = sum(values.numel() for values in weights.values())
    print(f"{options.out}: {len(weights)} tensors, {num_values:,} values of the {options.of} of {folder}")


COMMANDS = {"ls": ls, "verify": verify, "consolidate": consolidate}


def run(arguments: list[str] | None = None) -> None:
    """Does what the command line asks."""
    options = parse(arguments)
    COMMANDS[options.command](options)


def main(arguments: list[str] | None = None) -> int:
    """Exit code. A mistake of the user's, or a broken checkpoint, is told in one message."""
    return exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
