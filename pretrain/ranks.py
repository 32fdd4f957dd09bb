"""How does a command run, and end, that several ranks of torchrun work on together?"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta

import torch.distributed as dist

from pretrain.command import exit_code
from pretrain.main import silence


def exit_code_of_ranks(
    work: Callable[[list[str] | None], object],
    arguments: Sequence[str] | None,
    interrupted: str,
    timeout: timedelta,
    backend: str = "gloo",
) -> int:
    """`command.exit_code` of this rank; of several, those of the launcher's environment, the first alone prints.

    A collective call that takes longer than `timeout` fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return exit_code(work, arguments, interrupted)
    dist.init_process_group(backend, timeout=timeout)
    try:
        with nullcontext() if dist.get_rank() == 0 else silence():
            return exit_code(work, arguments, interrupted)
    finally:
        dist.destroy_process_group()
