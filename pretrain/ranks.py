"""How does a command run, and end, that several ranks of torchrun work on together? The first one speaks for all."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from pretrain.command import exit_code
from pretrain.main import silence

TOLD = (
    "pretrain/told"  # key of the ranks' store: the code with which the first rank has ended, having said why
)
PATIENCE = timedelta(seconds=20)  # of a rank with an error, for the first, which may have the same

Work = Callable[[list[str] | None], object]


def exit_code_of_ranks(
    work: Work,
    arguments: Sequence[str] | None,
    interrupted: str,
    timeout: timedelta,
    backend: str = "gloo",
) -> int:
    """`command.exit_code` of this rank; of several, those of the launcher's environment, the first alone prints.

    A rank whose error the first does not share tells it itself. Another rank ends with an error only after it was
    told, since launchers then kill the first. A collective call that takes longer than `timeout` fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return exit_code(work, arguments, interrupted)
    met: list[tuple[dist.Store, int]] = []
    if code := exit_code(lambda _: met.append(_meet(timeout, backend)), None, interrupted):
        return code
    store, rank = met[0]
    try:
        if rank == 0:
            code = exit_code(work, arguments, interrupted)
            store.set(TOLD, str(code))
            return code
        with redirect_stderr(io.StringIO()) as said:
            code = exit_code(_hushed(work), arguments, interrupted)
        if code and not _is_told(store):
            print(f"rank {rank}: {said.getvalue()}", end="", file=sys.stderr)
        return code
    finally:
        dist.destroy_process_group()


def _meet(timeout: timedelta, backend: str) -> tuple[dist.Store, int]:
    """The store of the ranks that the launcher's environment tells of, and which of them this one is.

    ValueError when they do not meet.
    """
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (OSError, RuntimeError, ValueError) as error:  # torch raises each of them
        told = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        named = ", ".join(f"{name}={value}" for name, value in told.items())
        raise ValueError(
            f"this rank does not meet the others by {named} ({str(error).partition(chr(10))[0]}): MASTER_ADDR must "
            "be an address of rank 0's machine and MASTER_PORT a free port there; start by torchrun, which sets all "
            "four, and try `python -m pretrain.preflight` where it fails"
        ) from error
    return store, rank


def _hushed(work: Work) -> Work:
    """What comes out of `exit_code` afterwards is the message alone."""

    def hushed(arguments: list[str] | None) -> object:
        with silence():
            return work(arguments)

    return hushed


def _is_told(store: dist.Store) -> bool:
    """Has the first rank told an error? No where it does other work, or is gone with its store: twice beats never."""
    try:
        store.wait([TOLD], PATIENCE)
        return store.get(TOLD) != b"0"
    except dist.DistError:
        return False
