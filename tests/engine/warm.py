"""One process imports what ranks need, and every rank is a fork of it: a start takes ten seconds of a processor less.

Reads a launch from each line of its standard input, as launch.py writes it, and answers with the exit codes by rank.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.metadata
import json
import os
import runpy
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

LOOKS = 0.02  # seconds between two looks at the ranks


def fork(command: Sequence[str], environment: Mapping[str, str], log: str) -> int:
    """The process of `python *command`, whose output goes to the end of `log`."""
    if process := os.fork():
        return process
    code: object = 1
    try:
        for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_APPEND)):
            os.dup2(os.open(path, flags), descriptor)
        os.dup2(1, 2)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code
    except BaseException:
        traceback.print_exc()
    finally:  # as an interpreter ends
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def ended(processes: Sequence[int], timeout: float, log: Path, kill_at: str | None) -> list[int]:
    """Exit codes, minus the signal of those that one ended; those that live after `timeout` seconds, or when `log`
    has the words `kill_at`, are killed.
    """
    codes: dict[int, int] = {}
    until = time.monotonic() + timeout
    while len(codes) < len(processes):
        is_over = time.monotonic() > until or (kill_at is not None and kill_at in log.read_text())
        for process in set(processes) - codes.keys():
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif is_over:
                os.kill(process, 9)
        time.sleep(LOOKS)
    return [codes[process] for process in processes]


def do_before_forks() -> None:
    """Imports what a rank does until its first engine is built, and does once what each would do for nothing."""
    gc.disable()  # while modules are imported, which makes millions of objects that stay
    import deepspeed.ops
    import pytest  # noqa: F401  by test files whose ranks are these
    import scipy.optimize
    import scipy.stats  # noqa: F401  not scikit-learn, which starts a thread
    import timm  # noqa: F401
    from transformers import AutoTokenizer, BertModel  # noqa: F401  of runs with text: half of a start

    import pretrain.train  # noqa: F401

    assert deepspeed.ops.__compatible_ops__  # probes for compilers
    # Whenever ranks meet, torch looks through all that is installed for its backends.
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
    importlib.metadata.entry_points(group="torch.distributed.backends")
    gc.enable()


def require_one_thread() -> None:
    assert len(os.listdir("/proc/self/task")) == 1, "a thread that holds a lock would be missing in a fork"


def main() -> None:
    """Until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print while they are imported is no answer
    do_before_forks()
    for line in sys.stdin:
        asked = json.loads(line)
        require_one_thread()
        processes = [fork(asked["command"], one, asked["log"]) for one in asked["environments"]]
        codes = ended(processes, asked["timeout"], Path(asked["log"]), asked["kill_at"])
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    main()
