"""How is a pre-training run started?

deepspeed pretrain/main.py --recipe m3i.demo --data NAME=DIR [NAME=DIR ...] --out DIR [options] [overrides]

The same command again goes on from the last checkpoint in --out. Without a launcher it runs as one process.
pretrain/arguments.py reads the options, `--help` lists them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The launcher puts pretrain/ first, whose `data` and `export` are no top-level modules.
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "pretrain")]

from pretrain.arguments import read  # noqa: E402
from pretrain.config import Run  # noqa: E402
from pretrain.exits import ENDS, FAILED, FINISHED, INTERRUPTED, LOST, MISTAKE, Preempted, RankLost  # noqa: E402
from pretrain.full_disk import is_no_room  # noqa: E402


def main(arguments: list[str]) -> int:
    """Exit code. A mistake of the user's is told in one message, a fault of ours as a traceback."""
    first_rank = os.environ.get("RANK", "0") == "0"
    try:
        with nullcontext() if first_rank else silence():
            asked = read(arguments)
        return start_replay(asked) if isinstance(asked, Path) else start(*asked)
    except (ValueError, OSError) as error:
        # A folder may be missing on one node alone, a mistake in the command is the same on all.
        if first_rank or (isinstance(error, OSError) and os.environ.get("LOCAL_RANK") == "0"):
            print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        if first_rank:
            print(
                "\ninterrupted: the same command goes on from the last checkpoint, if any",
                file=sys.stderr,
            )
        return INTERRUPTED


def start(run: Run, paths: argparse.Namespace) -> int:
    """Trains; exit code as of `main`. Imports torch and DeepSpeed, which takes seconds."""
    quieten()
    from pretrain.paths import Paths
    from pretrain.tellers import is_told_by_this_rank
    from pretrain.train import train

    try:
        train(
            run,
            Paths(
                paths.data,
                paths.out,
                paths.ds_config,
                paths.tokenizer,
                paths.guide,
                paths.workers,
                checkpoints=paths.checkpoints,
                timeout=paths.timeout,
                micro_batches=paths.micro_batches,
                trackers=tuple(name for name in ("wandb", "tensorboard") if getattr(paths, name)),
                price=paths.price,
                profile=paths.profile,
                compile=paths.compile,
                evaluate_every=paths.evaluate_every,
                evaluate_data=paths.evaluate_data,
                init=paths.init,
            ),
        )
    except tuple(ENDS) as error:
        if str(error) and (isinstance(error, RankLost) or is_told_by_this_rank(error)):
            print(f"\n{'stopped' if isinstance(error, Preempted) else 'error'}: {error}", file=sys.stderr)
        return ENDS[type(error)]
    except (ValueError, OSError) as error:
        if is_told_by_this_rank(error):
            print(f"\nerror: {explain(error, paths.out)}", file=sys.stderr)
        return FAILED
    return FINISHED


def start_replay(bundle: Path) -> int:
    """Runs a refused step again; FAILED also when it does not come out the same."""
    quieten()
    from pretrain.replay import replay
    from pretrain.tellers import is_told_by_this_rank

    try:
        return FINISHED if replay(bundle) else FAILED
    except (ValueError, OSError) as error:
        if is_told_by_this_rank(error):
            print(f"\nerror: {error}", file=sys.stderr)
        return FAILED


@contextmanager
def silence() -> Iterator[None]:
    """What all ranks would say, rank 0 says."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        yield


def explain(error: Exception, out: Path) -> str:
    """The message of an error, with a remedy where the system's own words for a full disk have none."""
    if is_no_room(error):
        return (
            f"{error}: no space is left for --out {out}; free some and start the same command again, it goes on "
            "from the last checkpoint"
        )
    return str(error)


def quieten() -> None:
    """Leaves of DeepSpeed's and NCCL's messages only errors, of warnings the sentence without its source line,
    and names the CPU where there is no GPU."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import deepspeed.utils.logging as messages

    messages.set_log_level_from_string("error")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the disk of the output is full: the interpreter would end with a code of its own
        os._exit(code)
    if code == LOST:  # what waits for the lost rank would wait at the interpreter's end too
        os._exit(code)
    sys.exit(code)
